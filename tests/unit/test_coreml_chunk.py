"""Pieces that run one after another are the whole, wherever it is cut; and where it is best cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.coreml.chunk import chunk, cut, join
from sfumato.coreml.palettize import palettize
from sfumato.coreml.program import (
    Feature,
    Function,
    Interface,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
)
from sfumato.coreml.runtime import Predictor
from sfumato.errors import ConfigError, UsageError

SHAPE = (2, 3)
WORDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32", np.dtype(np.bool_): "bool"}


class Writer:
    """Writes a program one operation after another; every operation has a name of its own."""

    def __init__(self, inputs: dict[str, str], shape: tuple[int, ...] = SHAPE) -> None:
        self.shape = shape
        self.inputs = tuple(Output(name, TensorType(dtype, shape)) for name, dtype in inputs.items())
        self.types = {one.name: one.type for one in self.inputs}
        self.operations: list[Operation] = []

    def name(self) -> str:
        return f"v{len(self.operations)}"

    def put(self, operation: Operation) -> str:
        self.operations.append(operation)
        self.types.update({one.name: one.type for one in operation.outputs})
        return operation.outputs[0].name

    def const(self, value: np.ndarray | str) -> str:
        type_ = TensorType("string") if isinstance(value, str) else TensorType(WORDS[value.dtype], value.shape)
        return self.put(constant(self.name(), Value(type_, value)))

    def apply(self, type_: str, to: str = "", **inputs: str) -> str:
        like = next(self.types[name] for name in inputs.values() if self.types[name].shape == self.shape)
        output = Output(self.name(), TensorType(to or like.dtype, self.shape))
        return self.put(Operation(type_, {key: (name,) for key, name in inputs.items()}, (output,)))

    def cast(self, x: str, dtype: str) -> str:
        return self.apply("cast", dtype, x=x, dtype=self.const(dtype))

    def model(self, outputs: list[str]) -> Model:
        interface = Interface(
            tuple(Feature(one.name, one.type, description="as it was") for one in self.inputs),
            tuple(Feature(name, self.types[name], description="as it was") for name in outputs),
        )
        function = Function(self.inputs, tuple(outputs), tuple(self.operations), "CoreML6")
        return Model(interface, Program({"main": function}), 7, {"key": "value"})


def count(model: Model) -> int:
    return sum(not one.type.startswith("const") for one in model.program.functions["main"].operations)


def run(models: list[Model], inputs: dict[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """One after the other; every feature is kept for those to come."""
    features = dict(inputs)
    for model in models:
        asked = {feature.name: features[feature.name] for feature in model.interface.inputs}
        features |= Predictor(model, precision=precision).predict(asked)
    return {feature.name: features[feature.name] for feature in models[-1].interface.outputs}


@st.composite
def programs(draw):
    """Half and single precision, truth values, constants used in many places, several outputs, some of them early."""
    writer = Writer({"x": "fp16", "t": "fp32", "idle": "fp16"})
    random = np.random.default_rng(draw(st.integers(0, 999)))
    known: dict[str, list[str]] = {"fp16": ["x"], "fp32": ["t"], "bool": []}
    shared = [writer.const(random.normal(size=(1, 3)).astype(np.float16)) for _ in range(2)]
    steps = st.sampled_from(["add", "mul", "weigh", "half", "single", "ask", "choose", "fork"])
    for step in draw(st.lists(steps, min_size=3, max_size=14)):
        of = draw(st.sampled_from(["fp16", "fp32"]))
        x, y = (draw(st.sampled_from(known[of])) for _ in range(2))
        if step in ("add", "mul"):
            known[of].append(writer.apply(step, x=x, y=y))
        elif step == "weigh":
            x = draw(st.sampled_from(known["fp16"]))
            known["fp16"].append(writer.apply("mul", x=x, y=draw(st.sampled_from(shared))))
        elif step == "half":
            known["fp16"].append(writer.cast(draw(st.sampled_from(known["fp32"])), "fp16"))
        elif step == "single":
            known["fp32"].append(writer.cast(draw(st.sampled_from(known["fp16"])), "fp32"))
        elif step == "ask":
            known["bool"].append(writer.apply("greater", "bool", x=x, y=y))
        elif step == "choose" and known["bool"]:
            asked = draw(st.sampled_from(known["bool"]))
            known[of].append(writer.apply("select", of, cond=asked, a=x, b=y))
        elif step == "fork":
            axis = writer.put(constant(writer.name(), Value(TensorType("int32"), np.array(0, np.int32))))
            number = writer.put(constant(writer.name(), Value(TensorType("int32"), np.array(2, np.int32))))
            halves = tuple(Output(f"{writer.name()}_{i}", TensorType(of, (1, 3))) for i in range(2))
            writer.put(Operation("split", {"x": (x,), "num_splits": (number,), "axis": (axis,)}, halves))
            known[of].append(writer.apply("add", of, x=halves[0].name, y=y))
            known[of].append(writer.apply("mul", of, x=halves[1].name, y=x))
    made = [name for name in known["fp16"] + known["fp32"] if name not in ("x", "t")]
    if not made:
        made = [writer.apply("add", x="x", y="x")]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    values = {"x": random.normal(size=SHAPE).astype(np.float16), "t": random.normal(size=SHAPE).astype(np.float32)}
    return writer.model(outputs), values | {"idle": np.zeros(SHAPE, np.float16)}


@settings(max_examples=250, deadline=None)
@given(program=programs(), data=st.data())
def test_the_pieces_are_the_whole(program, data):
    model, inputs = program
    places = st.lists(st.integers(1, max(1, count(model) - 1)), min_size=1, max_size=4, unique=True)
    positions = sorted(data.draw(places)) if count(model) > 1 else []
    pieces = cut(model, positions)
    assert len(pieces) == len(positions) + 1
    for precision in ("float32", "typed"):
        whole = run([model], inputs, precision)
        got = run(pieces, inputs, precision)
        assert list(got) == list(whole)
        for name, expected in whole.items():
            assert got[name].dtype == expected.dtype
            assert np.array_equal(got[name], expected, equal_nan=True)
    check_pieces(model, pieces)
    if len(pieces) > 1:
        joined = join(pieces)
        assert {one.name for one in joined.interface.inputs} <= {one.name for one in model.interface.inputs}
        got = run([joined], {one.name: inputs[one.name] for one in joined.interface.inputs}, "typed")
        whole = run([model], inputs, "typed")
        assert all(np.array_equal(got[name], expected, equal_nan=True) for name, expected in whole.items())


def check_pieces(model: Model, pieces: list[Model]) -> None:
    order = [one.name for one in model.interface.inputs]
    offered = set(order)
    for piece in pieces:
        function = piece.program.functions["main"]
        names = [one.name for one in function.inputs]
        own = [name for name in names if name in order]
        assert own == [name for name in order if name in own]
        assert names == [one.name for one in piece.interface.inputs]
        assert list(function.outputs) == [one.name for one in piece.interface.outputs]
        assert not set(names) & set(function.outputs)
        assert "idle" not in names
        # In single assignment, everything before it is read, nothing read that is not there, and no constant idle.
        known = set(names)
        read = {name for one in function.operations for name in one.names} | set(function.outputs)
        for operation in function.operations:
            assert set(operation.names) <= known
            assert not {one.name for one in operation.outputs} & known
            known |= {one.name for one in operation.outputs}
            assert operation.type != "const" or operation.outputs[0].name in read
        assert set(function.outputs) <= known
        assert set(names) <= offered
        assert {one.type.dtype for one in (*piece.interface.inputs, *piece.interface.outputs)} <= {
            "fp16",
            "fp32",
            "int32",
        }
        assert piece.metadata == model.metadata
        offered |= set(function.outputs)
    assert pieces[-1].interface.outputs == model.interface.outputs


def chain(sizes: list[int], seed: int = 0) -> Writer:
    """x times one weight after another; each weight is as large as said."""
    writer = Writer({"x": "fp16"}, (1, max(sizes)))
    random = np.random.default_rng(seed)
    at = "x"
    for size in sizes:
        # One number is multiplied with, so that weights of any size fit.
        weight = writer.const(random.normal(size=(1, size)).astype(np.float16))
        at = writer.apply("mul", x=at, y=weight)
    return writer


def weights(model: Model) -> list[int]:
    return [one.outputs[0].type.shape[-1] for one in model.program.functions["main"].operations if one.type == "const" and one.outputs[0].type.dtype == "fp16"]  # fmt: skip


def test_bytes_decide_and_not_the_number_of_operations():
    model = chain([90, 10, 10, 10, 10, 10, 10, 10, 10, 10]).model(["v19"])
    assert [weights(piece) for piece in chunk(model)] == [[90], [10] * 9]


@pytest.mark.parametrize("parts", range(2, 9))
def test_equal_weights_are_parted_equally(parts):
    pieces = chunk(chain([64] * 4 * parts).model([f"v{8 * parts - 1}"]), parts)
    assert [len(weights(piece)) for piece in pieces] == [4] * parts


def test_programs_without_weights_are_cut_by_length():
    writer = Writer({"x": "fp16"})
    at = "x"
    for _ in range(6):
        at = writer.apply("add", x=at, y=at)
    assert [count(piece) for piece in chunk(writer.model([at]), 3)] == [2 + 1, 2 + 2, 2 + 1]


def test_palettes_count_as_what_they_take():
    writer, at = Writer({"x": "fp16"}, (64, 64)), "x"
    for number in range(10):
        weight = np.random.default_rng(number).normal(size=(64, 64)) / 8
        at = writer.apply("matmul", x=at, y=writer.const(weight.astype(np.float16)))
    plain = writer.model([at])
    names = [f"v{2 * number}" for number in range(10)]
    # At one bit the first eight weigh as much as half of one other.
    packed = palettize(plain, dict.fromkeys(names[:8], 1))
    function = packed.program.functions["main"]
    assert sum(one.type == "constexpr_lut_to_dense" for one in function.operations) == 8
    pieces = chunk(packed)
    kinds = [[one.type for one in piece.program.functions["main"].operations].count("constexpr_lut_to_dense") for piece in pieces]  # fmt: skip
    assert kinds == [8, 0]
    inputs = {"x": np.ones((64, 64), np.float16)}
    assert np.array_equal(run(pieces, inputs, "typed")["v19"], run([packed], inputs, "typed")["v19"])


def test_of_equal_places_that_where_least_travels():
    """A skip connection over the middle is not cut where a place beside it, almost as equal, needs no other feature."""
    writer = Writer({"x": "fp16"}, (1, 64))
    random = np.random.default_rng(0)

    def weigh(at: str) -> str:
        return writer.apply("mul", x=at, y=writer.const(random.normal(size=(1, 64)).astype(np.float16)))

    at = "x"
    for _ in range(19):
        at = weigh(at)
    skip = at
    for _ in range(5):
        at = weigh(at)
    at = writer.apply("add", x=at, y=skip)
    for _ in range(16):
        at = weigh(at)
    first, second = chunk(writer.model([at]))
    assert len(first.interface.outputs) == 1
    assert len(weights(first)) == 19
    assert [one.name for one in second.interface.inputs] == [first.interface.outputs[0].name]


def test_halves_travel_as_floats_under_their_own_names():
    writer = chain([8, 8])
    first, second = cut(writer.model(["v3"]), [1])
    assert first.interface.outputs == (Feature("v1", TensorType("fp32", (1, 8))),)
    assert second.interface.inputs == (Feature("v1", TensorType("fp32", (1, 8))),)
    assert first.program.functions["main"].operations[-1].type == "cast"
    assert second.program.functions["main"].operations[1].type == "cast"


def test_an_operation_is_named_after_what_it_computes():
    writer = chain([8, 8])
    named = writer.model(["v3"]).program.functions["main"]
    text = TensorType("string")
    operations = [
        replace(one, attributes={**one.attributes, "name": Value(text, one.outputs[0].name)})
        for one in named.operations
    ]
    pieces = cut(writer.model(["v3"]).with_functions(lambda _: replace(named, operations=tuple(operations))), [1])
    for one in (operation for piece in pieces for function in piece.functions for operation in function.operations):
        assert one.attributes["name"].read() == one.outputs[0].name


def test_names_that_are_taken_are_left_alone():
    writer = chain([8, 8])
    function = writer.model(["v3"]).program.functions["main"]
    renamed = {"v0": "v1_fp16", "v2": "v1_fp16__dtype_0"}

    def name(text: str) -> str:
        return renamed.get(text, text)

    operations = tuple(
        replace(
            one,
            inputs={key: tuple(name(entry) for entry in entries) for key, entries in one.inputs.items()},
            outputs=tuple(Output(name(each.name), each.type) for each in one.outputs),
        )
        for one in function.operations
    )
    model = writer.model(["v3"]).with_functions(lambda _: replace(function, operations=operations))
    pieces = cut(model, [1])
    check_pieces(model, pieces)
    inputs = {"x": np.ones((1, 8), np.float16)}
    assert np.array_equal(run(pieces, inputs, "typed")["v3"], run([model], inputs, "typed")["v3"])


def test_what_cannot_be_cut():
    model = chain([8, 8, 8]).model(["v5"])
    for parts in (0, 1, 9):
        with pytest.raises(UsageError, match="2 to 8 chunks"):
            chunk(model, parts)
    with pytest.raises(UsageError, match="3 operations cannot be split into 4"):
        chunk(model, 4)
    for positions in ([0], [3], [2, 1], [1, 1]):
        with pytest.raises(UsageError, match="between 1 and 2"):
            cut(model, positions)
    with pytest.raises(ConfigError, match="already split"):
        chunk(join(chunk(model)))
    function = model.program.functions["main"]
    with pytest.raises(ConfigError, match="one function"):
        chunk(replace(model, body=Program({"main": function, "other": function})))


@pytest.mark.parametrize("type_", [TensorType("fp64", (1, 8)), TensorType("fp16", (None, 8)), TensorType("string", ())])
def test_values_that_no_feature_holds_do_not_travel(type_):
    one = Operation("first", {"x": ("x",)}, (Output("odd", type_),))
    two = Operation("second", {"x": ("odd",)}, (Output("y", TensorType("fp16", (1, 8))),))
    three = Operation("third", {"x": ("y",)}, (Output("z", TensorType("fp16", (1, 8))),))
    x = Output("x", TensorType("fp16", (1, 8)))
    interface = Interface((Feature("x", x.type),), (Feature("z", x.type),))
    function = Function((x,), ("z",), (one, two, three), "CoreML6")
    model = Model(interface, Program({"main": function}), 7)
    first, _ = chunk(model)
    assert [operation.type for operation in first.program.functions["main"].operations][:2] == ["first", "second"]
    with pytest.raises(ConfigError, match="Core ML features do"):
        cut(model, [1])
    with pytest.raises(ConfigError, match="cannot be split"):
        chunk(model, 3)


def test_pipelines():
    pieces = chunk(chain([8, 8, 8, 8]).model(["v7"]), 3)
    pieces[1] = replace(pieces[1], spec_version=9)
    joined = join(pieces)
    assert [one for _, one in joined.body] == pieces
    assert len({name for name, _ in joined.body}) == 3
    assert joined.spec_version == 9
    assert [one.name for one in joined.interface.inputs] == ["x"]
    assert [one.name for one in joined.interface.outputs] == ["v7"]
    for models in ([], pieces[:1], [joined, pieces[0]]):
        with pytest.raises(UsageError, match="at least two models"):
            join(models)
