"""Which constants are which weights: by name in our programs, by what they hold in those of others."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.coreml.matching import Weights, least_db
from sfumato.coreml.palettize import palettize
from sfumato.coreml.program import Model, Output, TensorType, Value
from sfumato.coreml.verification import Check, Verification
from support.coreml_programs import model, operation

HALF = TensorType("fp16", (1, 8))
MASK = np.triu(np.full((77, 77), -1e4, np.float16), 1)


def network(seed: int = 0) -> nn.Module:
    """Layers of one shape, one turned, and one of its own."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(48, 80), "d": nn.Conv2d(8, 16, 5)}
    )


def half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().half().numpy()


def program(**constants: np.ndarray) -> Model:
    """A program that multiplies with its constants."""
    consts = [operation("const", {name: TensorType("fp16", array.shape)}) for name, array in constants.items()]
    consts = [
        replace(one, attributes={"val": Value(one.outputs[0].type, array)})
        for one, array in zip(consts, constants.values(), strict=True)
    ]
    readers = [operation("linear", {f"{name}_y": HALF}, x=("x",), weight=(name,)) for name in constants]
    last = replace(readers[-1], outputs=(Output("y", HALF),))
    return model({"x": HALF}, {"y": HALF}, *consts, *readers[:-1], last)


def find(one: Model, *, named: bool, of: nn.Module | None = None):
    return Weights(lambda: of or network()).find([one], named=named)


def test_constants_with_their_parameters_names():
    net = network()
    matches = find(
        program(a_weight=half(net["a"].weight), c_weight=half(net["c"].weight)[:, :, None, None], other=MASK),
        named=True,
    )
    assert {name: one.key for name, one in matches.found.items()} == {"a_weight": "a.weight", "c_weight": "c.weight"}
    worst = matches.worst(compressed=False)
    assert worst is not None
    assert worst.near
    assert worst.db == math.inf
    assert matches.worst(compressed=True) is None


@pytest.mark.parametrize(
    "change",
    [np.negative, lambda w: w * np.float16(1.01), lambda w: np.roll(w, 1), lambda w: np.where(w == w[3, 5], 0, w)],
)
def test_a_changed_weight_is_not_the_one_it_is_named_after(change):
    matches = find(program(a_weight=change(half(network()["a"].weight)).astype(np.float16)), named=True)
    assert not matches.found["a_weight"].near


def test_others_constants_are_known_by_what_they_hold():
    net = network()
    held = {
        "k0": half(net["b"].weight),
        "k1": half(net["c"].weight).T,
        "k2": half(net["a"].weight),
        "k3": half(net["b"].bias)[:, None],
    }
    held |= {"k4": half(network(1)["a"].weight), "mask": MASK}
    matches = find(program(**held), named=False)
    assert {name: one.key for name, one in matches.found.items()} == {
        "k0": "b.weight", "k1": "c.weight", "k2": "a.weight", "k3": "b.bias",
    }  # fmt: skip
    # In their places go the checkpoint's own numbers, as it has them; what is none of its weights stays.
    exact = matches.put_into(program(**held))
    values = {
        one.outputs[0].name: one.attributes["val"]
        for one in exact.program.functions["main"].operations
        if one.type == "const"
    }
    assert np.array_equal(values["k1"].read(), net["c"].weight.detach().numpy().T)
    assert values["k1"].type == TensorType("fp32", (48, 80))
    assert np.array_equal(values["k4"].read(), held["k4"])


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 6, 8]), seed=st.integers(0, 20), named=st.booleans(), cube=st.booleans())
def test_palettes_are_near_to_their_weights_and_to_no_others(bits, seed, named, cube):
    net = network(seed)
    with torch.no_grad():
        if cube:  # far outliers, as trained weights have
            net["b"].weight.copy_(torch.randn(64, 64) ** 3)
    packed = palettize(program(b_weight=half(net["b"].weight)), bits)
    (match,) = find(packed, named=named, of=net).found.values()
    assert match.key == "b.weight"
    assert match.near, match
    (match,) = find(packed, named=named, of=network(seed + 100)).found.values()
    assert not match.near, match
    assert match.db < 1


def test_a_palette_that_was_damaged_is_not_near():
    """Numbers far above any floor for six bits, but not those nearest to the weights in their own table."""
    net = network()
    packed = palettize(program(a_weight=half(net["a"].weight)), 6)
    function = packed.program.functions["main"]
    (broken,) = (one for one in function.operations if one.type == "constexpr_lut_to_dense")
    table = np.array(broken.attributes["lut"].read())
    table[20:44] = table[20:44][::-1]
    broken = replace(broken, attributes={**broken.attributes, "lut": Value(broken.attributes["lut"].type, table)})
    swapped = tuple(broken if one.outputs == broken.outputs else one for one in function.operations)
    (match,) = find(packed.with_functions(lambda _: replace(function, operations=swapped)), named=True).found.values()
    assert match.db < match.needed
    assert match.needed > least_db(6)


def test_what_loses_nothing_is_part_of_the_graph_and_what_nothing_is_like_is_told():
    held = {"mask": MASK, "zero": np.zeros((64, 64), np.float16), "odd": half(torch.randn(33, 65))}
    matches = find(palettize(program(**held), 2), named=False)
    assert matches.found == {}
    assert matches.unknown == ["odd"]


def test_verdicts():
    proved, wrong = Check("unet", "graph", 90.0, 60.0), Check("unet", "graph", 20.0, 60.0)
    open_, told = replace(wrong, undecided=True), Check("unet", "as shipped", 20.0, None)
    assert [one.verdict for one in (proved, wrong, open_, told)] == ["ok", "WRONG", "not proved", "reported"]
    # What is only reported must be finite even so.
    assert replace(told, db=-math.inf).verdict == "WRONG"
    place = SimpleNamespace()
    for checks, passed, is_wrong, word in (
        ((proved, told), True, False, "ok"),
        ((proved, open_), False, False, "not proved"),
        ((open_, wrong), False, True, "WRONG"),
    ):
        proof = Verification(place, "x", checks)
        assert (proof.passed, proof.wrong, proof.to_dict()["verdict"]) == (passed, is_wrong, word)
