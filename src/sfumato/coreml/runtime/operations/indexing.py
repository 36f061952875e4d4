"""Gather, scatter, and operations that create tensors from shapes and counts."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.coreml.runtime.kinds import HELD
from sfumato.errors import CheckpointError

__all__ = ["INDEXING"]


def _wrapped(indices: Tensor, side: int) -> Tensor:
    """Return non-negative int64 indices; negative ones count from the end, as defined in iOS 16."""
    indices = indices.long()
    return torch.where(indices < 0, indices + side, indices)


def _gather(call: Call) -> Bound:
    axis, batch = call.integer("axis", 0), call.integer("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        place = axis % x.dim()
        wanted = _wrapped(indices, x.shape[place])
        if batch:
            return _gather_batched(x, wanted, place, batch)
        if wanted.dim() == 1:
            return x.index_select(place, wanted)
        return (
            x.index_select(place, wanted.reshape(-1)).unflatten(place, wanted.shape)
            if wanted.dim()
            else x.select(place, int(wanted))
        )

    return call.bind(run, "x", "indices", moves=True)


def _gather_batched(x: Tensor, indices: Tensor, axis: int, batch: int) -> Tensor:
    """Gather with the first `batch` axes shared by both tensors."""
    shared = x.shape[:batch]
    rows = [
        row.index_select(axis - batch, places.reshape(-1)).reshape(
            *row.shape[: axis - batch], *places.shape, *row.shape[axis - batch + 1 :]
        )
        for row, places in zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    ]
    return torch.stack(rows).unflatten(0, shared)


def _gather_along_axis(call: Call) -> Bound:
    axis = call.integer("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        return torch.take_along_dim(x, _wrapped(indices, x.shape[axis]), axis)

    return call.bind(run, "x", "indices", moves=True)


def _gather_nd(call: Call) -> Bound:
    batch = call.integer("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        if not batch:
            return x[_coordinates(indices, x)]
        rows = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
        return torch.stack([row[_coordinates(places, row)] for row, places in rows]).unflatten(0, x.shape[:batch])

    return call.bind(run, "x", "indices", moves=True)


def _coordinates(indices: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Split the last axis of `indices` into one index tensor per leading axis of x."""
    return tuple(_wrapped(each, x.shape[axis]) for axis, each in enumerate(indices.unbind(-1)))


_MODES: Mapping[str, str] = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(data: Tensor, flat: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Combine `updates` into a copy of `data` at flat indices, according to `mode`."""
    result = data.reshape(-1).clone()
    flat, updates = flat.reshape(-1), updates.reshape(-1)
    if mode == "update":
        result[flat] = updates
    elif mode == "sub":
        result.index_add_(0, flat, -updates)
    elif mode == "div":
        result = result / torch.ones_like(result).scatter_reduce_(0, flat, updates, "prod")
    elif mode == "add":
        result.index_add_(0, flat, updates)
    elif mode in _MODES:
        result.scatter_reduce_(0, flat, updates, _MODES[mode])
    else:
        raise CheckpointError(f"the mode {mode!r} of a scatter is unknown")
    return result.reshape(data.shape)


def _places(data: Tensor) -> Tensor:
    return torch.arange(data.numel()).reshape(data.shape)


def _scatter(call: Call) -> Bound:
    axis, mode = call.integer("axis", 0), call.text("mode", "add")

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        flat = _places(data).index_select(axis, _wrapped(indices, data.shape[axis]).reshape(-1))
        return _scattered(data, flat, updates, mode)

    return call.bind(run, "data", "indices", "updates")


def _scatter_along_axis(call: Call) -> Bound:
    axis, mode = call.integer("axis", 0), call.text("mode", "add")

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        flat = torch.take_along_dim(_places(data), _wrapped(indices, data.shape[axis]), axis)
        return _scattered(data, flat, updates, mode)

    return call.bind(run, "data", "indices", "updates")


def _scatter_nd(call: Call) -> Bound:
    mode = call.text("mode", "add")

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return _scattered(data, _places(data)[_coordinates(indices, data)], updates, mode)

    return call.bind(run, "data", "indices", "updates")


def _shape(call: Call) -> Bound:
    sides = call.type().shape
    if None not in sides:
        return Bound(lambda: torch.tensor(sides, dtype=torch.int32), ())
    return call.bind(lambda x: torch.tensor(x.shape, dtype=torch.int32), "x")


def _fill(call: Call) -> Bound:
    shape, value = call.ints("shape"), call.number("value", 0.0)
    dtype = HELD[call.output.dtype]
    return Bound(lambda: torch.full(shape, value).to(dtype), ())


def _fill_like(call: Call) -> Bound:
    value, dtype = call.number("value", 0.0), HELD[call.output.dtype]
    return call.bind(lambda x: torch.full(x.shape, value).to(dtype), "ref_tensor")


def _range_1d(call: Call) -> Bound:
    start, end, step = call.number("start"), call.number("end"), call.number("step")
    count = max(ceil((end - start) / step), 0)
    dtype = HELD[call.output.dtype]
    return Bound(lambda: (start + step * torch.arange(count, dtype=torch.float64)).to(dtype), ())


def _one_hot(call: Call) -> Bound:
    size, axis = call.integer("one_hot_vector_size"), call.integer("axis", -1)
    on, off = call.number("on_value", 1.0), call.number("off_value", 0.0)
    dtype = HELD[call.output.dtype]

    def run(indices: Tensor) -> Tensor:
        place = axis if axis >= 0 else axis + indices.dim() + 1
        counted = torch.arange(size).reshape([-1] + [1] * (indices.dim() - place))
        hot = indices.long().unsqueeze(place) == counted
        return torch.where(hot, torch.tensor(on), torch.tensor(off)).to(dtype)

    return call.bind(run, "indices")


def _band_part(call: Call) -> Bound:
    lower, upper = call.integer("lower", -1), call.integer("upper", -1)

    def run(x: Tensor) -> Tensor:
        below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])[None]
        kept = ((below <= lower) | (lower < 0)) & ((-below <= upper) | (upper < 0))
        return torch.where(kept, x, torch.zeros((), dtype=x.dtype))

    return call.bind(run, "x", moves=True)


def _non_zero(call: Call) -> Bound:
    return call.bind(lambda x: torch.nonzero(x).to(torch.int32), "x")


INDEXING: Mapping[str, Binder] = {
    "band_part": _band_part,
    "fill": _fill,
    "fill_like": _fill_like,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "non_zero": _non_zero,
    "one_hot": _one_hot,
    "range_1d": _range_1d,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "shape": _shape,
}
