"""The portable runtime around its operations: what is asked of callers and files, and when values live."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sfumato.coreml.program import (
    Feature,
    Flexibility,
    Function,
    Interface,
    LazyArray,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
)
from sfumato.coreml.runtime import Predictor, executor, predictor
from sfumato.errors import CheckpointError, UsageError
from support.coreml_programs import model, operation, value

HALF, SINGLE = TensorType("fp16", (2, 3)), TensorType("fp32", (2, 3))


def doubled(**changes) -> Model:
    """y = 2 x + 1, in fp16, returned in fp32."""
    made = model(
        {"x": HALF},
        {"y": SINGLE},
        operation("mul", {"twice": HALF}, x=("x",), y=np.float16(2)),
        operation("add", {"more": HALF}, x=("twice",), y=np.float16(1)),
        operation("cast", {"y": SINGLE}, x=("more",), dtype="fp32"),
    )
    return replace(made, **changes)


def weighted(count: int, reads: list[int], data: object = None) -> Model:
    """`count` times x + weight, with a weight of 5000 numbers that is in a file; `reads` collects its readings."""
    type_ = TensorType("fp32", (5000,))

    def read() -> np.ndarray:
        reads.append(1)
        return np.ones(5000, np.float32)

    names = ["x", *(f"sum_{place}" for place in range(count))]
    steps = [operation("add", {after: type_}, x=(before,), y=("weight",)) for before, after in pairwise(names)]
    return model({"x": type_}, {names[-1]: type_}, constant("weight", Value(type_, LazyArray(read))), *steps)


class TestInputs:
    def test_numbers_of_any_type_are_cast(self):
        expected = np.float32([[1, 3, 5], [7, 9, 11]])
        for dtype in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8):
            (found,) = Predictor(doubled()).predict({"x": np.arange(6, dtype=dtype).reshape(2, 3)}).values()
            assert found.dtype == np.float32
            assert np.array_equal(found, expected)
        assert np.array_equal(Predictor(doubled()).predict({"x": [[0, 1, 2], [3, 4, 5]]})["y"], expected)
        assert np.array_equal(Predictor(doubled()).predict({"x": torch.arange(6).reshape(2, 3)})["y"], expected)

    def test_an_input_of_type_fp16_is_rounded_to_it(self):
        x = np.full((2, 3), 1 + 2**-12)
        assert np.array_equal(Predictor(doubled()).predict({"x": x})["y"], np.full((2, 3), 3.0))

    def test_results_come_in_the_types_of_the_interface(self):
        half = replace(doubled(), interface=Interface((Feature("x", HALF),), (Feature("y", HALF),)))
        assert Predictor(half).predict({"x": np.ones((2, 3))})["y"].dtype == np.float16
        assert Predictor(half).run({"x": torch.ones(2, 3)})["y"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, ["'x'", "missing", "float16", "(2, 3)"]),
            ({"xs": np.ones((2, 3))}, ["'xs'", "did you mean 'x'"]),
            ({"x": np.ones((2, 3)), "z": 1}, ["'z'", "it takes 'x'"]),
            ({"x": np.ones((3, 2))}, ["'x'", "(2, 3)", "(3, 2)"]),
            ({"x": np.ones(3)}, ["'x'", "(2, 3)", "(3,)"]),
            ({"x": np.array([["a", "b", "c"]] * 2)}, ["'x'", "float16", "<U1"]),
            ({"x": [[1, 2], [3]]}, ["'x'", "not an array"]),
            ({"x": np.ones((2, 3), complex)}, ["'x'", "complex"]),
        ],
    )
    def test_wrong_ones_are_named(self, given, words):
        with pytest.raises(UsageError) as error:
            Predictor(doubled()).predict(given)
        assert all(word in str(error.value) for word in words), str(error.value)

    def test_tensors_are_checked_too(self):
        with pytest.raises(UsageError, match=r"'x'.*\(1, 3\)"):
            Predictor(doubled()).run({"x": torch.ones(1, 3)})
        with pytest.raises(UsageError, match="missing"):
            Predictor(doubled()).run({})

    def test_integers_must_be_whole_and_in_range(self):
        type_ = TensorType("int32", (2,))
        made = Predictor(model({"n": type_}, {"m": type_}, operation("add", {"m": type_}, x=("n",), y=np.int32(1))))
        assert made.predict({"n": np.float32([1, -2])})["m"].tolist() == [2, -1]
        assert made.predict({"n": np.float32([1, -2])})["m"].dtype == np.int32
        for wrong in ([0.5, 1], [np.nan, 1], [2.0**31, 1]):
            with pytest.raises(UsageError, match=r"'n'.*int32"):
                made.predict({"n": np.array(wrong)})
        with pytest.raises(UsageError, match=r"'n'.*int32"):
            made.predict({"n": np.array([2**31, 1])})

    def test_flexible_sides_take_any_size(self):
        type_ = TensorType("fp32", (None, 3))
        made = model({"x": type_}, {"y": type_}, operation("square", {"y": type_}, x=("x",)))
        for side in (1, 4):
            assert Predictor(made).predict({"x": np.ones((side, 3))})["y"].shape == (side, 3)
        with pytest.raises(UsageError, match=r"\(any, 3\)"):
            Predictor(made).predict({"x": np.ones((2, 4))})

    @pytest.mark.parametrize(
        ("flexibility", "right", "wrong", "words"),
        [
            (
                Flexibility((1, 8, 8), shapes=((1, 8, 8), (1, 16, 12))),
                [(1, 8, 8), (1, 16, 12)],
                [(1, 5, 5), (1, 8, 12), (1, 16, 8), (2, 8, 8)],
                "in the shape (1, 8, 8) or (1, 16, 12); its shape is ",
            ),
            (
                Flexibility((1, 8, 8), ranges=((1, 1), (4, 16), (4, None))),
                [(1, 4, 4), (1, 16, 99)],
                [(1, 3, 8), (1, 17, 8), (1, 8, 3), (2, 8, 8), (1, 8, 8, 1)],
                "in the shape (1, 4 to 16, 4 or more); its shape is ",
            ),
        ],
    )
    def test_shapes_that_core_ml_refuses_are_refused(self, flexibility, right, wrong, words):
        type_ = TensorType("fp32", (1, None, None))
        made = model({"x": type_}, {"y": type_}, operation("square", {"y": type_}, x=("x",)))
        feature = replace(made.interface.inputs[0], flexibility=flexibility)
        made = Predictor(replace(made, interface=replace(made.interface, inputs=(feature,))))
        for shape in right:
            assert made.predict({"x": np.ones(shape)})["y"].shape == shape
        for shape in wrong:
            for ask, give in ((made.predict, np.ones), (made.run, torch.ones)):
                with pytest.raises(UsageError) as error:
                    ask({"x": give(shape)})
                assert f"{words}{shape}" in str(error.value)

    @pytest.mark.parametrize("default", [0.5, 0.0])
    def test_an_input_with_a_default_may_be_left_out(self, default):
        made = model({"x": HALF, "y": HALF}, {"z": HALF}, operation("add", {"z": HALF}, x=("x",), y=("y",)))
        inputs = made.interface.inputs
        optional = replace(inputs[1], optional=True, default=default)
        made = Predictor(replace(made, interface=replace(made.interface, inputs=(inputs[0], optional))))
        x = np.ones((2, 3), np.float16)
        assert np.array_equal(made.predict({"x": x})["z"], x + np.float16(default))
        assert np.array_equal(made.run({"x": torch.ones(2, 3)})["z"], x + np.float32(default))
        assert np.array_equal(made.predict({"x": x, "y": 2 * x})["z"], 3 * x)
        with pytest.raises(UsageError, match="'x' is missing"):
            made.predict({"y": x})

    @pytest.mark.parametrize("color", ["RGB", "BGR", "GRAYSCALE"])
    def test_pictures_as_people_have_them(self, color):
        from PIL import Image

        channels = 1 if color == "GRAYSCALE" else 3
        type_ = TensorType("fp32", (1, channels, 4, 6))
        made = model({"x": type_}, {"y": type_}, operation("mul", {"y": type_}, x=("x",), y=np.float32(2)))
        feature = replace(made.interface.inputs[0], image=color)
        made = Predictor(replace(made, interface=replace(made.interface, inputs=(feature,))))
        pixels = np.random.default_rng(0).integers(0, 256, (4, 6, channels), np.uint8)
        pixels = pixels[..., 0] if channels == 1 else pixels
        planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        planes = (planes[::-1] if color == "BGR" else planes)[None].astype(np.float32)
        for picture in (Image.fromarray(pixels), pixels, planes):
            assert np.array_equal(made.predict({"x": picture})["y"], 2 * planes)
        with pytest.raises(UsageError, match=r"must be an array of float32 in the shape \(1, ., 4, 6\)"):
            made.predict({"x": pixels[:3]})


class TestPrecision:
    def test_typed_rounds_every_result_of_type_fp16_and_float32_none(self):
        type_ = TensorType("fp16", (1,))
        made = model(
            {"x": type_},
            {"y": type_},
            operation("add", {"large": type_}, x=("x",), y=np.float16(2048)),
            operation("sub", {"y": type_}, x=("large",), y=np.float16(2048)),
        )
        assert Predictor(made).predict({"x": [1.0]})["y"] == [0]  # 2049 is not a number of fp16
        assert Predictor(made, precision="float32").predict({"x": [1.0]})["y"] == [1]

    def test_what_overflows_is_infinite_in_typed_precision_only(self):
        type_ = TensorType("fp16", (1,))
        made = model(
            {"x": type_},
            {"y": type_},
            operation("square", {"large": type_}, x=("x",)),
            operation("sqrt", {"y": type_}, x=("large",)),
        )
        assert np.isinf(Predictor(made).predict({"x": [300.0]})["y"])
        assert Predictor(made, precision="float32").predict({"x": [300.0]})["y"] == [300]

    def test_an_unknown_one_is_refused(self):
        with pytest.raises(UsageError, match="'half'"):
            Predictor(doubled(), precision="half")  # pyright: ignore[reportArgumentType]


class TestFunctions:
    def two(self) -> Model:
        one = doubled().program.functions["main"]
        added = operation("add", {"y": SINGLE}, x=("x",), y=np.float32(10))
        other = Function((Output("x", SINGLE),), ("y",), (added,), "CoreML8")
        return replace(doubled(), body=Program({"main": one, "ten": other}))

    def test_one_is_chosen_by_name(self):
        x = np.zeros((2, 3))
        assert Predictor(self.two()).predict({"x": x})["y"][0, 0] == 1
        assert Predictor(self.two(), function="ten").predict({"x": x})["y"][0, 0] == 10
        assert Predictor(replace(self.two(), default_function="ten")).predict({"x": x})["y"][0, 0] == 10

    def test_one_that_does_not_exist_is_named(self):
        with pytest.raises(UsageError, match=r"'tem'.*did you mean 'ten'.*'main', 'ten'"):
            Predictor(self.two(), function="tem")

    def test_each_may_have_an_interface_of_its_own(self):
        own = Interface((Feature("x", SINGLE),), (Feature("y", HALF),))
        made = replace(self.two(), interfaces={"ten": own})
        assert Predictor(made, function="ten").interface is own
        assert Predictor(made, function="ten").predict({"x": np.zeros((2, 3))})["y"].dtype == np.float16

    def test_a_pipeline_has_none(self):
        made = replace(doubled(), body=(("one", doubled()),))
        with pytest.raises(UsageError, match="'main'"):
            Predictor(made, function="main")


class TestPipelines:
    def halves(self) -> Model:
        first = model({"x": SINGLE}, {"h": SINGLE}, operation("add", {"h": SINGLE}, x=("x",), y=np.float32(1)))
        last = model({"x": SINGLE, "h": SINGLE}, {"y": SINGLE}, operation("mul", {"y": SINGLE}, x=("x",), y=("h",)))
        interface = Interface((Feature("x", SINGLE),), (Feature("y", SINGLE),))
        return Model(interface, (("first", first), ("last", last)), 8)

    def test_features_are_handed_on_by_name(self):
        x = np.arange(6).reshape(2, 3)
        assert np.array_equal(Predictor(self.halves()).predict({"x": x})["y"], x * (x + 1))

    def test_they_can_be_observed(self):
        seen = []
        Predictor(self.halves()).observe(
            {"x": np.ones((2, 3))}, lambda each, index, values: seen.append((each.type, index))
        )
        assert seen == [("add", 0), ("mul", 0)]

    def test_a_feature_that_nobody_gives_is_named(self):
        made = self.halves()
        with pytest.raises(CheckpointError, match="'h'"):
            Predictor(replace(made, body=made.body[1:])).predict({"x": np.ones((2, 3))})
        with pytest.raises(CheckpointError, match="'y'"):
            Predictor(replace(made, body=made.body[:1])).predict({"x": np.ones((2, 3))})


class TestBadPrograms:
    def test_an_unknown_operation_is_named_when_the_predictor_is_made(self):
        made = model({"x": HALF}, {"y": HALF}, operation("lstm", {"y": HALF}, x=("x",)))
        with pytest.raises(CheckpointError, match=r"operation 0 'lstm' \(y\) of function 'main'"):
            Predictor(made)

    def test_one_that_nobody_reads_does_not_matter(self):
        extra = operation("lstm", {"unread": HALF}, x=("x",))
        made = model({"x": HALF}, {"y": HALF}, extra, operation("relu", {"y": HALF}, x=("x",)))
        assert Predictor(made).predict({"x": np.ones((2, 3))})["y"].shape == (2, 3)

    def test_a_value_that_nothing_computes_is_named(self):
        made = model({"x": HALF}, {"y": HALF}, operation("add", {"y": HALF}, x=("x",), y=("ghost",)))
        with pytest.raises(CheckpointError, match=r"operation 0 'add'.*'ghost'"):
            Predictor(made)
        with pytest.raises(CheckpointError, match="'y'"):
            Predictor(model({"x": HALF}, {"y": HALF}))

    def test_a_missing_parameter_is_named(self):
        made = model({"x": HALF}, {"y": HALF}, operation("transpose", {"y": HALF}, x=("x",)))
        with pytest.raises(CheckpointError, match=r"operation 0 'transpose'.*'perm'"):
            Predictor(made)

    @pytest.mark.parametrize("kind", ["reshape", "batch_norm", "mul", "matmul", "einsum", "softmax", "concat", "conv"])
    def test_a_missing_input_is_named(self, kind):
        last = operation("relu", {"y": HALF}, x=("broken",))
        made = model({"x": HALF}, {"y": HALF}, operation(kind, {"broken": HALF}), last)
        with pytest.raises(CheckpointError, match=rf"operation 0 '{kind}' \(broken\)"):
            Predictor(made).predict({"x": np.ones((2, 3))})

    def test_parameters_that_do_not_fit_are_named(self):
        count = operation("range_1d", {"y": HALF}, start=0, end=3, step=0)
        with pytest.raises(CheckpointError, match="operation 0 'range_1d'"):
            Predictor(model({"x": HALF}, {"y": HALF}, count))

    def test_an_unknown_word_is_named(self):
        made = model({"x": HALF}, {"y": HALF}, operation("cast", {"y": HALF}, x=("x",), dtype="complex"))
        with pytest.raises(CheckpointError, match=r"operation 0 'cast'.*'complex'"):
            Predictor(made)
        made = model({"x": HALF}, {"y": HALF}, operation("gelu", {"y": HALF}, x=("x",), mode="WILD"))
        with pytest.raises(CheckpointError, match=r"operation 0 'gelu'.*'WILD'"):
            Predictor(made)

    def test_what_fails_in_a_run_is_named(self):
        made = model({"x": HALF}, {"y": HALF}, operation("reshape", {"y": HALF}, x=("x",), shape=np.int32([5, 5])))
        with pytest.raises(CheckpointError, match=r"operation 0 'reshape' .* could not be computed"):
            Predictor(made).predict({"x": np.ones((2, 3))})

    def test_a_constant_without_a_value_is_named(self):
        empty = Operation("const", {}, (Output("c", HALF),))
        made = model({"x": HALF}, {"y": HALF}, empty, operation("add", {"y": HALF}, x=("x",), y=("c",)))
        with pytest.raises(CheckpointError, match=r"operation 0 'const'"):
            Predictor(made)

    def test_compressed_weights_that_do_not_fit_are_named(self):
        weight = operation(
            "constexpr_sparse_to_dense",
            {"w": SINGLE},
            nonzero_data=np.ones(5, np.float32),
            mask=np.zeros(1, np.uint8),
            shape=np.uint32([2, 3]),
        )
        made = model({"x": SINGLE}, {"y": SINGLE}, weight, operation("add", {"y": SINGLE}, x=("x",), y=("w",)))
        with pytest.raises(CheckpointError, match=r"operation 0 'constexpr_sparse_to_dense'"):
            Predictor(made).predict({"x": np.ones((2, 3))})


class TestWeights:
    def test_they_are_read_in_the_first_run_and_kept(self):
        reads: list[int] = []
        made = Predictor(weighted(3, reads))
        assert not reads
        for _ in range(2):
            assert made.predict({"x": np.zeros(5000)})["sum_2"][0] == 3
        assert len(reads) == 1

    def test_they_are_read_before_each_use_where_memory_is_short(self, monkeypatch):
        reads: list[int] = []
        monkeypatch.setattr(predictor, "_free_memory", lambda: 5000 * 4 * 2 - 1)
        made = Predictor(weighted(3, reads))
        for _ in range(2):
            assert made.predict({"x": np.zeros(5000)})["sum_2"][0] == 3
        assert len(reads) == 6

    def test_what_follows_from_constants_is_computed_once(self, monkeypatch):
        calls = []
        counted = lambda call: call.bind(lambda x: calls.append(1) or x.square(), "x")  # noqa: E731
        monkeypatch.setitem(planner_table(), "square", counted)
        made = model(
            {"x": SINGLE},
            {"y": SINGLE},
            operation("square", {"nine": SINGLE}, x=np.full((2, 3), 3.0, np.float32)),
            operation("add", {"y": SINGLE}, x=("x",), y=("nine",)),
        )
        made = Predictor(made)
        for _ in range(2):
            assert made.predict({"x": np.zeros((2, 3))})["y"][0, 0] == 9
        assert len(calls) == 1

    def test_a_long_chain_of_constants_is_no_more_work_than_a_short_one(self):
        chain = [
            operation("add", {f"v{i + 1}": SINGLE}, x=(f"v{i}",), y=(f"v{i}",)) for i in range(60)
        ]  # 2^60 sums if each value were computed for each of its readers
        start = constant("v0", Value(SINGLE, np.ones((2, 3), np.float32)))
        made = model({"x": SINGLE}, {"y": SINGLE}, start, *chain, operation("mul", {"y": SINGLE}, x=("x",), y=("v60",)))
        assert Predictor(made).predict({"x": np.ones((2, 3))})["y"][0, 0] == 2.0**60

    def test_packed_indices_that_are_too_few_are_named(self):
        weight = operation(
            "constexpr_lut_to_dense",
            {"w": SINGLE},
            indices=np.zeros(1, np.uint8),
            lut=np.arange(4, dtype=np.float32),
            shape=np.uint32([2, 3]),
        )
        made = model({"x": SINGLE}, {"y": SINGLE}, weight, operation("add", {"y": SINGLE}, x=("x",), y=("w",)))
        with pytest.raises(CheckpointError, match=r"'constexpr_lut_to_dense'.*1 bytes do not hold 6 numbers"):
            Predictor(made).predict({"x": np.ones((2, 3))})

    def test_an_output_that_is_a_constant_is_the_callers_own(self):
        made = Predictor(model({"x": SINGLE}, {"c": SINGLE}, constant("c", value(np.ones((2, 3), np.float32)))))
        made.run({"x": torch.zeros(2, 3)})["c"].zero_()
        assert made.run({"x": torch.zeros(2, 3)})["c"].sum() == 6


def planner_table() -> dict:
    from sfumato.coreml.runtime import planner

    return planner._TABLE


class TestObserving:
    def test_every_computed_operation_is_shown_in_order_with_its_outputs(self):
        seen = []
        made = Predictor(doubled())
        made.observe(
            {"x": np.ones((2, 3))}, lambda each, index, values: seen.append((each.type, index, float(values[0][0, 0])))
        )
        assert seen == [("mul", 0, 2.0), ("add", 1, 3.0), ("cast", 2, 3.0)]

    def test_all_outputs_of_an_operation_are_shown(self):
        half = TensorType("fp32", (2, 1))
        split = operation("split", {"a": half, "b": half, "c": half}, x=("x",), axis=1, num_splits=3)
        made = model({"x": SINGLE}, {"b": half}, split)
        seen = []
        Predictor(made).observe({"x": np.arange(6).reshape(2, 3)}, lambda each, index, values: seen.extend(values))
        assert [each[0, 0].item() for each in seen] == [0, 1, 2]

    def test_an_error_of_the_visitor_is_its_own(self):
        def fail(*_):
            raise ValueError("mine")

        with pytest.raises(ValueError, match=r"^mine$"):
            Predictor(doubled()).observe({"x": np.ones((2, 3))}, fail)


@pytest.mark.parametrize("count", [3, 20])
def test_a_value_lives_until_its_last_use(count):
    """Of a long chain, with one value that is read again at its end, three are alive at most."""
    type_ = TensorType("fp32", (4,))
    names = ["x", *(f"v{place}" for place in range(count)), "y"]
    steps = [operation("exp", {after: type_}, x=(before,)) for before, after in pairwise(names[:-1])]
    last = operation("add", {"y": type_}, x=(names[-2],), y=("v0",))
    alive: list[weakref.ref] = []
    counts = []

    def visit(each, index, values):
        alive.extend(weakref.ref(value) for value in values)
        counts.append(sum(reference() is not None for reference in alive))

    Predictor(model({"x": type_}, {"y": type_}, *steps, last)).observe({"x": np.zeros(4)}, visit)
    assert len(counts) == count + 1
    assert max(counts) == 3


def test_weights_widened_for_one_use_do_not_outlive_it(monkeypatch):
    live, most = [], []

    def widened(array, dtype):
        tensor = torch.from_numpy(np.array(array))
        live.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in live))
        return tensor

    from sfumato.coreml.runtime import constants

    monkeypatch.setattr(constants, "tensor_of", widened)
    monkeypatch.setattr(predictor, "_free_memory", lambda: 0)
    Predictor(weighted(6, [])).predict({"x": np.zeros(5000)})
    assert len(most) == 6
    assert max(most) == 1


def test_the_slots_of_a_plan_are_freed_once():
    made = executor.Executable(doubled().program.functions["main"], "main", typed=True, budget=0)
    freed = [slot for step in made._steps for slot in step.frees]
    assert len(freed) == len({*freed}) == 3


def test_metadata_is_that_of_the_model():
    assert Predictor(doubled(metadata={"made": "here"})).metadata == {"made": "here"}
