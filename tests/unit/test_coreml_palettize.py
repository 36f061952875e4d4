"""Palettes: which weights get one, that each number is the nearest of the table, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfumato.coreml.palettize import decompress, palettize, read_recipe, recipe_for, weights_of
from sfumato.coreml.program import (
    Feature,
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
from sfumato.errors import CheckpointError, ConfigError, UsageError

X = Output("x", TensorType("fp16", (1, 8)))
Y = Output("y", TensorType("fp16", (1, 8)))
WORDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32", np.dtype(np.int32): "int32"}


def value(array: np.ndarray) -> Value:
    return Value(TensorType(WORDS[array.dtype], array.shape), array)


def reader(kind: str, role: str, name: str) -> Operation:
    """An operation that reads a constant."""
    inputs = {"x": ("x",)} | {role: (name,)}
    return Operation(kind, inputs, (Output(f"{name}_{kind}", Y.type),))


def model(
    weights: dict[str, np.ndarray], opset: str = "CoreML6", readers: tuple[Operation, ...] | None = None
) -> Model:
    """A program with constants, and operations that read them: products, if no others are given."""
    if readers is None:
        readers = tuple(reader("linear", "weight", name) for name in weights)
    operations = [constant(name, value(array)) for name, array in weights.items()]
    operations += [*readers, Operation("identity", {"x": ("x",)}, (Y,))]
    function = Function((X,), ("y",), tuple(operations), opset)
    interface = Interface((Feature("x", X.type),), (Feature("y", Y.type),))
    return Model(interface, Program({"main": function}), 7)


def operations(one: Model) -> dict[str, Operation]:
    return {operation.outputs[0].name: operation for operation in one.program.functions["main"].operations}


def plain(one: Model, name: str) -> np.ndarray:
    return operations(decompress(one))[name].attributes["val"].read()


def normal(*shape: int, seed: int = 0, dtype: type = np.float16) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 0.05).astype(dtype)


@settings(max_examples=60, deadline=None)
@example(shape=(2**22 + 5,), bits=6, opset="CoreML6", dtype=np.float16, seed=0)
@example(shape=(2**22 + 5,), bits=4, opset="CoreML8", dtype=np.float32, seed=0)
@given(
    shape=st.sampled_from([(2049,), (50, 41), (7, 300, 1, 1), (3, 1, 8, 99)]),
    bits=st.sampled_from([1, 2, 4, 6, 8]),
    opset=st.sampled_from(["CoreML6", "CoreML7", "CoreML8", "CoreML9"]),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 99),
)
def test_every_number_becomes_the_nearest_of_the_table(shape, bits, opset, dtype, seed):
    weight = normal(*shape, seed=seed, dtype=dtype)
    packed = palettize(model({"w": weight}, opset), bits)
    operation = operations(packed)["w"]
    assert operation.type == "constexpr_lut_to_dense"
    assert operation.outputs == (Output("w", TensorType(WORDS[weight.dtype], shape)),)
    got = plain(packed, "w")
    assert got.shape == shape
    assert got.dtype == dtype
    table = np.unique(got.astype(np.float64))
    assert len(table) <= 2**bits
    numbers = weight.astype(np.float64).ravel()
    place = np.searchsorted((table[:-1] + table[1:]) / 2, numbers)
    # Numbers in float32 go the way of their group, which is as wide as a number in half precision.
    group = 0 if dtype == np.float16 else 2.0**-11 * np.abs(numbers).max()
    assert np.all(np.abs(got.ravel() - numbers) <= np.abs(table[place] - numbers) + 2 * group)


def test_the_form_of_ios_16():
    weight = normal(64, 33, 1, 1)
    operation = operations(palettize(model({"w": weight}), 6))["w"]
    assert operation.inputs == {}
    types = {name: one.type for name, one in operation.attributes.items()}
    assert types == {
        "name": TensorType("string"),
        "indices": TensorType("uint8", (64 * 33 * 6 // 8,)),
        "lut": TensorType("fp16", (64,)),
        "shape": TensorType("uint32", (4,)),
    }
    for name in ("indices", "lut", "shape"):
        found = operation.attributes[name].read()
        assert (found.shape, found.dtype.name) == (
            types[name].shape,
            {"lut": "float16", "shape": "uint32"}.get(name, "uint8"),
        )
    assert operation.attributes["name"].read() == "w"
    assert list(operation.attributes["shape"].read()) == [64, 33, 1, 1]


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_the_form_of_ios_18(bits):
    weight = normal(64, 33, 1, 1)
    operation = operations(palettize(model({"w": weight}, "CoreML8"), bits))["w"]
    (indices,), (table,) = operation.inputs["indices"], operation.inputs["lut"]
    assert set(operation.attributes) == {"name"}
    assert indices.type == TensorType(f"uint{bits}", weight.shape)
    assert table.type == TensorType("fp16", (1, 1, 1, 1, 2**bits, 1))
    assert indices.read().shape == weight.shape
    assert int(indices.read().max()) == 2**bits - 1
    assert table.read().shape == table.type.shape


@pytest.mark.parametrize("opset", ["CoreML6", "CoreML8"])
def test_few_different_numbers_are_kept_exactly(opset):
    weight = np.random.default_rng(0).choice(np.array([-1.5, 0.0, 0.25, 7.0], np.float16), (9, 300))
    assert np.array_equal(plain(palettize(model({"w": weight}, opset), 2), "w"), weight)
    zeros = np.zeros((9, 300), np.float16)
    assert np.array_equal(plain(palettize(model({"w": zeros}, opset), 1), "w"), zeros)


def test_what_gets_no_palette():
    """Only what products multiply with is a weight: no mask, no table, no statistics, at any size."""
    gather = Operation("gather", {"x": ("table",), "indices": ("ids",)}, (Output("g", TensorType("fp16", (1,))),))
    weights = {
        "small": normal(2048),
        "large": normal(2049),
        "table": normal(100, 30),
        "ids": np.zeros(1, np.int32),
        "whole": np.zeros(5000, np.int32),
        "mask": np.triu(np.full((77, 77), -1e4, np.float16), 1),
        "mean": np.zeros(2560, np.float16),
        "bias": normal(10240),
        "scale": normal(2560),
        "tied": normal(100, 30),
        "returned": normal(100, 30),
        "unread": normal(100, 30),
    }
    readers = (
        gather,
        *(reader("linear", "weight", name) for name in ("small", "large", "whole", "tied", "returned")),
        reader("gather", "x", "tied"),
        reader("add", "y", "mask"),
        reader("batch_norm", "mean", "mean"),
        reader("conv", "bias", "bias"),
        reader("layer_norm", "gamma", "scale"),
    )
    before = model(weights, readers=readers)
    function = before.program.functions["main"]
    before = before.with_functions(lambda _: dataclasses.replace(function, outputs=("y", "returned")))
    assert list(weights_of(before)) == ["large"]
    after = operations(palettize(before, 4))
    assert {name for name, one in after.items() if one.type.startswith("constexpr")} == {"large"}
    for name, one in operations(before).items():
        assert name == "large" or after[name] is one


@pytest.mark.parametrize(("kind", "role"), [("conv", "weight"), ("conv_transpose", "weight"), ("linear", "weight"), ("matmul", "x"), ("matmul", "y"), ("einsum", "values")])  # fmt: skip
def test_what_products_multiply_with_gets_one(kind, role):
    assert list(weights_of(model({"w": normal(2049)}, readers=(reader(kind, role, "w"),)))) == ["w"]


def test_a_palettized_model_stays_as_it_is(caplog):
    once = palettize(model({"w": normal(9, 300)}, "CoreML8"), 4)
    assert palettize(once, 2) is once
    assert "no weight of the model was compressed" in caplog.text


def test_same_weights_same_palettes():
    one, other = (palettize(model({"w": normal(80, 80)}), 6) for _ in range(2))
    for name in ("indices", "lut"):
        first, second = (operations(each)["w"].attributes[name].read() for each in (one, other))
        assert np.array_equal(first, second)


def test_one_weight_is_read_at_a_time_and_none_kept():
    events = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def read(self):
            events.append(self.name)
            return normal(3000)

    parts = [constant(name, Value(TensorType("fp16", (3000,)), Watched(name))) for name in "abc"]
    one = model({}, readers=tuple(reader("linear", "weight", name) for name in "abc"))
    function = one.program.functions["main"]
    one = one.with_functions(lambda _: dataclasses.replace(function, operations=(*parts, *function.operations)))
    packed = palettize(one, 4)
    assert events == ["a", "b", "c"]
    plain(packed, "a")
    assert events == ["a", "b", "c"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_that_are_not_finite_are_named(bad, dtype):
    weight = normal(50, 50, dtype=dtype)
    weight[3, 4] = bad
    with pytest.raises(CheckpointError, match="weight w has NaN or infinite"):
        palettize(model({"w": weight}), 4)


@pytest.mark.parametrize("bits", [0, 3, 5, 7, 9, -1, {"w": 3}])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(UsageError, match="palettes have 1, 2, 4, 6 or 8 bits"):
        palettize(model({"w": normal(50, 50)}), bits)
    if isinstance(bits, int):
        with pytest.raises(UsageError, match="palettes have"):
            palettize(model({}), bits)


def test_old_programs_have_no_palettes():
    with pytest.raises(ConfigError, match="CoreML5 have no palettes"):
        palettize(model({"w": normal(50, 50)}, "CoreML5"), 4)


def test_recipes(tmp_path):
    one = model({"a": normal(50, 50), "b": normal(50, 50), "c": normal(50, 50)})
    path = tmp_path / "recipe.json"
    path.write_text('{"a": 2, "b": 16}')
    after = operations(palettize(one, read_recipe(path)))
    assert [after[name].type for name in "abc"] == ["constexpr_lut_to_dense", "const", "const"]
    assert after["a"].attributes["lut"].type.shape == (4,)
    with pytest.raises(UsageError, match=r"'aa', which is not a weight of this model \(did you mean 'a'\?\)"):
        palettize(model({"a": normal(50, 50)}), {"aa": 2})
    for wrong in ('{"a": 3}', '{"a": "4"}', '{"a": true}', '{"a": null}', '{"a": [4]}'):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="'a' has"):
            read_recipe(path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        read_recipe(path)


@pytest.mark.parametrize("target", [5.0, 20.0, 35.0, 45.0])
def test_a_recipe_has_the_fewest_bits_that_reach_the_target(target):
    weights = {
        "bell": normal(90, 90),
        "two": np.where(normal(90, 90) > 0, 1.0, -1.0).astype(np.float16),
        "float32": normal(90, 90, seed=1, dtype=np.float32),
        "zero": np.zeros((90, 90), np.float16),
    }
    one = model(weights)
    recipe = recipe_for(one, target)
    assert list(recipe) == list(weights)
    assert recipe["two"] == recipe["zero"] == 1

    def ratio(name: str, bits: int) -> float:
        exact, got = (each.astype(np.float64) for each in (weights[name], plain(palettize(one, {name: bits}), name)))
        noise = ((exact - got) ** 2).sum()
        return 10 * math.log10((exact**2).sum() / noise) if noise else math.inf

    for name, bits in recipe.items():
        if bits != 16:
            assert ratio(name, bits) >= target - 1e-3
        fewer = [other for other in (1, 2, 4, 6, 8) if other < bits]
        assert all(ratio(name, other) < target + 1e-3 for other in fewer)


def test_no_palette_reaches_what_is_beyond_reach():
    assert recipe_for(model({"w": normal(90, 90)}), 90.0) == {"w": 16}


def test_pipelines_are_palettized_in_all_their_parts():
    parts = tuple((name, model({f"w_{name}": normal(50, 50)})) for name in "ab")
    whole = dataclasses.replace(parts[0][1], body=parts)
    after = palettize(whole, 4)
    for name, part in after.body:
        assert operations(part)[f"w_{name}"].type == "constexpr_lut_to_dense"
    for name, part in decompress(after).body:
        assert operations(part)[f"w_{name}"].type == "const"


def test_compressed_constants_that_are_made_from_constants():
    table = np.array([1.0, 5.0], np.float16).reshape(1, 1, 2, 1)
    indices = Value(TensorType("uint1", (2, 3)), LazyArray(lambda: np.array([[0, 1, 1], [1, 0, 0]], np.uint8)))
    output = Output("w", TensorType("fp16", (2, 3)))
    operation = Operation("constexpr_lut_to_dense", {"indices": (indices,), "lut": ("table",)}, (output,))
    one = model({"table": table}, "CoreML8", (operation,))
    assert plain(one, "w").tolist() == [[1, 5, 5], [5, 1, 1]]
