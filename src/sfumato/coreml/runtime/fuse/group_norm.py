"""Recognizes group normalization spelled out in ML Programs and fuses it into one operation.

The chain is: split the channels into groups, subtract the mean, divide by the square root of the variance, join the
groups, then scale and shift each channel ("Group Normalization", arXiv 1803.08494, eq. 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfumato.coreml.program import Operation, Output, TensorType, Value
from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.coreml.runtime.fuse.graph import Entry, Graph

__all__ = ["GROUP_NORM", "fuse_group_norms"]

# From this many pixels on, torch's group normalization with channels last is imprecise.
MANY = 2**14
_NORM, _SCALE, _SHIFT = "fused group_norm", "fused scale", "fused shift"


def fuse_group_norms(graph: Graph) -> None:
    """Replace every chain whose intermediate values are not used elsewhere."""
    for place, operation in graph.each("reshape"):
        found = _normalized(graph, operation)
        if found is not None:
            x, groups, epsilon = found
            graph.replace(place, [_group_norm(operation.outputs[0], x, groups, epsilon, {})])
    for place, operation in graph.each("batch_norm"):
        _take_in_batch_norm(graph, place, operation)
    for kind in ("mul", "add"):
        for place, operation in graph.each(kind):
            _take_in_vector(graph, place, operation)


def _normalized(graph: Graph, joined: Operation) -> tuple[Entry, int, float] | None:
    """Return the input, number of groups and epsilon if the chain ends in this reshape, else None."""
    found = _divided(graph, joined.inputs["x"][0]) or _divided_by_scaled(graph, joined.inputs["x"][0])
    if found is None:
        return None
    centred, variance, epsilon, squared_value, readers = found
    squared = graph.inner(variance.inputs["x"][0], "square")
    subtracted = graph.maker(centred, "sub")
    if squared is None or subtracted is None or squared.inputs["x"][0] != squared_value:
        return None
    if graph.readers(centred) != readers:
        return None
    grouped = subtracted.inputs["x"][0]
    mean = graph.inner(subtracted.inputs["y"][0], "reduce_mean")
    split = graph.maker(grouped, "reshape")
    if mean is None or split is None or mean.inputs["x"][0] != grouped or graph.readers(grouped) != 2:
        return None
    x = split.inputs["x"][0]
    shape, inside = graph.shape(x), graph.shape(grouped)
    if shape is None or inside is None or graph.shape(joined.outputs[0].name) != shape or len(shape) < 2:
        return None
    axes = tuple(range(2, len(inside)))
    if len(inside) < 3 or any(_axes(graph, each, len(inside)) != axes for each in (mean, variance)):
        return None
    if inside[0] != shape[0] or shape[1] % inside[1]:
        return None
    return x, inside[1], epsilon


class _Division(NamedTuple):
    """Centred values over the root of the mean of squares: what is squared, and how often the former are read."""

    centred: str
    variance: Operation
    epsilon: float
    squared: str
    readers: int


def _divided(graph: Graph, entry: Entry) -> _Division | None:
    """Return the division of centred values by their deviation if a value is one, else None."""
    if (division := graph.inner(entry, "real_div")) is not None:
        centred, root = division.inputs["x"][0], graph.inner(division.inputs["y"][0], "sqrt")
        inverse = 0.0
    elif (division := graph.inner(entry, "mul")) is not None:
        centred, root = division.inputs["x"][0], graph.inner(division.inputs["y"][0], "rsqrt")
        given = None if root is None else graph.numbers(root, "epsilon")
        if root is None or ("epsilon" in root.inputs and given is None):
            return None
        inverse = 1e-12 if given is None else float(given[0])
    else:
        return None
    if root is None or not isinstance(centred, str):
        return None
    below, epsilon = root.inputs["x"][0], inverse
    if (added := graph.inner(below, "add")) is not None:
        below, more = _with_scalar(graph, added)
        if more is None:
            return None
        epsilon += more
    variance = graph.inner(below, "reduce_mean")
    return None if variance is None else _Division(centred, variance, epsilon, centred, 2)


def _divided_by_scaled(graph: Graph, entry: Entry) -> _Division | None:
    """Like `_divided`, if the deviation is that of values divided by a scale per group, times that scale.

    This scaling avoids squares that overflow float16 (converter/layers.py). It cancels out if the scale is positive.
    """
    division = graph.inner(entry, "real_div")
    times = None if division is None else graph.inner(division.inputs["y"][0], "mul")
    if division is None or times is None:
        return None
    centred, (scale,), (under,) = division.inputs["x"][0], times.inputs["x"], times.inputs["y"]
    root = graph.inner(under, "sqrt")
    added = None if root is None else graph.inner(root.inputs["x"][0], "add")
    least = graph.maker(scale, "maximum")
    if added is None or least is None or not isinstance(centred, str) or (graph.scalar(least.inputs["y"][0]) or 0) <= 0:
        return None
    variance, squared = graph.inner(added.inputs["x"][0], "reduce_mean"), graph.inner(added.inputs["y"][0], "square")
    if variance is None or squared is None or graph.shape(scale) != graph.shape(variance.outputs[0].name):
        return None
    epsilon_root = graph.inner(squared.inputs["x"][0], "real_div")
    squares = graph.inner(variance.inputs["x"][0], "square")
    unit = None if squares is None else graph.inner(squares.inputs["x"][0], "real_div")
    if epsilon_root is None or unit is None or unit.inputs["x"][0] != centred:
        return None
    number = graph.scalar(epsilon_root.inputs["x"][0])
    if number is None or unit.inputs["y"][0] != scale or epsilon_root.inputs["y"][0] != scale:
        return None
    return _Division(centred, variance, number**2, unit.outputs[0].name, 3)


def _with_scalar(graph: Graph, operation: Operation) -> tuple[Entry, float | None]:
    """Return the operand of an operation that is not a constant scalar, and the scalar, or None."""
    x, y = operation.inputs["x"][0], operation.inputs["y"][0]
    if graph.scalar(y) is None:
        x, y = y, x
    # A constant with more axes than the values would add axes to them.
    return x, graph.scalar(y) if graph.shape(x) == graph.shape(operation.outputs[0].name) else None


def _axes(graph: Graph, operation: Operation, rank: int) -> tuple[int, ...] | None:
    """Return the axes that are reduced and kept, else None."""
    axes, kept = graph.numbers(operation, "axes"), graph.numbers(operation, "keep_dims")
    if axes is None or kept is None or not kept[0]:
        return None
    return tuple(sorted(int(axis) % rank for axis in axes))


def _group_norm(
    output: Output, x: Entry, groups: int, epsilon: float, affine: Mapping[str, tuple[Entry, ...]]
) -> Operation:
    attributes = {"groups": _whole(groups), "epsilon": _number(epsilon)}
    return Operation(_NORM, {"x": (x,), **affine}, (output,), attributes)


def _take_in_batch_norm(graph: Graph, place: int, operation: Operation) -> None:
    """Merge a batch normalization that only scales and shifts into the group normalization."""
    norm = graph.inner(operation.inputs["x"][0], _NORM)
    given = {name: entries for name, entries in operation.inputs.items() if name != "x"}
    if norm is None or set(norm.inputs) != {"x"} or any(graph.constant(each[0]) is None for each in given.values()):
        return
    name, channels = operation.outputs[0].name, graph.type(operation.inputs["mean"][0]).shape
    # fp32, because values inside one operation are not rounded.
    scale = Output(f"{name}/scale", TensorType("fp32", channels))
    shift = Output(f"{name}/shift", TensorType("fp32", channels))
    affine: dict[str, tuple[Entry, ...]] = {"gamma": (scale.name,), "beta": (shift.name,)}
    graph.replace(
        place,
        [
            Operation(_SCALE, given, (scale,)),
            Operation(_SHIFT, given, (shift,)),
            Operation(_NORM, {"x": norm.inputs["x"], **affine}, operation.outputs, norm.attributes),
        ],
    )


def _take_in_vector(graph: Graph, place: int, operation: Operation) -> None:
    """Merge the scale or shift by a constant of shape (1, C, 1, …) into the group normalization."""
    wanted = "gamma" if operation.type == "mul" else "beta"
    for near, far in (("x", "y"), ("y", "x")):
        norm = graph.inner(operation.inputs[near][0], _NORM)
        vector = operation.inputs[far][0]
        value = graph.constant(vector)
        if norm is None or value is None or wanted in norm.inputs or (wanted == "gamma" and "beta" in norm.inputs):
            continue
        shape, sides = graph.shape(vector), graph.shape(operation.outputs[0].name)
        if shape is None or sides is None or graph.shape(norm.outputs[0].name) != sides:
            continue
        if (1,) * (len(sides) - len(shape)) + shape != (1, sides[1]) + (1,) * (len(sides) - 2):
            continue
        inputs = {**norm.inputs, wanted: (vector,)}
        graph.replace(place, [Operation(_NORM, inputs, operation.outputs, norm.attributes)])
        return


def _whole(number: int) -> Value:
    return Value(TensorType("int32"), np.array(number, np.int32))


def _number(number: float) -> Value:
    return Value(TensorType("fp64"), np.array(number, np.float64))


def _bind_norm(call: Call) -> Bound:
    groups, epsilon = call.integer("groups"), call.number("epsilon")
    given = call.given("gamma", "beta")

    def run(x: Tensor, *affine: Tensor) -> Tensor:
        vectors = dict(zip(given, (each.reshape(-1) for each in affine), strict=True))
        gamma, beta = vectors.get("gamma"), vectors.get("beta")
        if x.dim() == 4 and x.shape[2:].numel() >= MANY and not x.is_contiguous():
            return _by_moments(x, groups, gamma, beta, epsilon)
        return torch.group_norm(x, groups, gamma, beta, epsilon)

    return call.bind(run, "x", *given)


def _by_moments(x: Tensor, groups: int, gamma: Tensor | None, beta: Tensor | None, epsilon: float) -> Tensor:
    """Normalize images with channels last.

    In this layout, torch's own implementation sums pixel by pixel in float32, which leaves 103 dB at 512² pixels.
    Averaging first over pixels, then over the channels of a group, is precise and fast.
    """
    grouped = x.unflatten(1, (groups, -1))
    mean = grouped.mean((3, 4), True).mean(2, True)
    variance = (grouped - mean).square_().mean((3, 4), True).mean(2, True)
    one = x.new_ones(x.shape[1])
    scale = torch.rsqrt(variance + epsilon) * (one if gamma is None else gamma).reshape(1, groups, -1, 1, 1)
    shift = (0 * one if beta is None else beta).reshape(1, groups, -1, 1, 1) - mean * scale
    return torch.addcmul(shift.flatten(1, 2), x, scale.flatten(1, 2))


def _bind_scale(call: Call) -> Bound:
    epsilon = call.number("epsilon", 1e-5)

    def run(variance: Tensor, gamma: Tensor | None = None) -> Tensor:
        scale = torch.rsqrt(variance + epsilon)
        return scale if gamma is None else gamma * scale

    return call.bind(run, "variance", *call.given("gamma"))


def _bind_shift(call: Call) -> Bound:
    epsilon = call.number("epsilon", 1e-5)
    given = call.given("gamma", "beta")

    def run(mean: Tensor, variance: Tensor, *affine: Tensor) -> Tensor:
        vectors = dict(zip(given, affine, strict=True))
        shift = -mean * torch.rsqrt(variance + epsilon)
        shift = shift * vectors["gamma"] if "gamma" in vectors else shift
        return shift + vectors["beta"] if "beta" in vectors else shift

    return call.bind(run, "mean", "variance", *given)


GROUP_NORM: Mapping[str, Binder] = {_NORM: _bind_norm, _SCALE: _bind_scale, _SHIFT: _bind_shift}
