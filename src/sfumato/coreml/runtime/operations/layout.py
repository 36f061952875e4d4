"""Operations that only rearrange values: reshaping, transposing, slicing and joining."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.runtime.call import Binder, Bound, Call

__all__ = ["LAYOUT"]


def _reshape(call: Call) -> Bound:
    shape = call.ints("shape")
    if 0 not in shape:
        return call.bind(lambda x: x.reshape(shape), "x", moves=True)

    def run(x: Tensor) -> Tensor:
        # 0 is the size of x's axis at the same position from the end, or 1 if x has no such axis.
        surplus = len(shape) - x.dim()
        own = [1] * surplus + list(x.shape[max(-surplus, 0) :])
        return x.reshape([own[place] if side == 0 else side for place, side in enumerate(shape)])

    return call.bind(run, "x", moves=True)


def _reshape_like(call: Call) -> Bound:
    begins, ends, whole = call.each("begins"), call.each("ends"), call.each("end_masks")

    def run(x: Tensor, *references: Tensor) -> Tensor:
        shape: list[int] = []
        for reference, begin, end, to_the_end in zip(references, begins, ends, whole, strict=True):
            shape += reference.shape[begin : None if to_the_end else end]
        return x.reshape(shape)

    return call.bind(run, "x", "ref_tensors", moves=True)


def _transpose(call: Call) -> Bound:
    order = call.ints("perm")
    return call.bind(lambda x: x.permute(order), "x", moves=True)


def _squeeze(call: Call) -> Bound:
    axes = call.ints("axes", None)
    return call.bind(lambda x: x.squeeze() if axes is None else x.squeeze(axes), "x", moves=True)


def _expand_dims(call: Call) -> Bound:
    rank = call.rank()
    axes = call.ints("axes")
    places = sorted(axis % (rank + len(axes)) for axis in axes)

    def run(x: Tensor) -> Tensor:
        for place in places:
            x = x.unsqueeze(place)
        return x

    return call.bind(run, "x", moves=True)


def _concat(call: Call) -> Bound:
    axis = call.integer("axis")
    if not call.flag("interleave"):
        return call.bind(lambda *values: torch.cat(values, axis), "values", moves=True)
    place = axis % len(call.output.shape)
    return call.bind(lambda *values: torch.stack(values, place + 1).flatten(place, place + 1), "values", moves=True)


def _stack(call: Call) -> Bound:
    axis = call.integer("axis")
    return call.bind(lambda *values: torch.stack(values, axis), "values", moves=True)


def _split(call: Call) -> Bound:
    axis, sizes = call.integer("axis"), call.ints("split_sizes", None)
    count = len(call.operation.outputs)
    if count == 1:
        return call.bind(lambda x: x, "x", moves=True)
    if sizes is not None:
        return call.bind(lambda x: x.split(sizes, axis), "x", moves=True)
    return call.bind(lambda x: x.split(x.shape[axis] // count, axis), "x", moves=True)


def _stepped(x: Tensor, axis: int, part: slice) -> Tensor:
    """Return `x[..., part, ...]` at one axis, with any step; torch has no negative steps."""
    start, stop, step = part.indices(x.shape[axis])
    count = len(range(start, stop, step))
    if count == 0:
        return x.narrow(axis, 0, 0)
    if step == 1:
        return x.narrow(axis, start, count)
    first = start if step > 0 else start + (count - 1) * step
    index = (slice(None),) * axis + (slice(first, first + (count - 1) * abs(step) + 1, abs(step)),)
    return x[index] if step > 0 else x[index].flip(axis)


def _slice_by_index(call: Call) -> Bound:
    rank = call.rank()
    begin, end = call.ints("begin"), call.ints("end")
    steps = call.ints("stride", (1,) * rank)
    from_start, to_end = call.flags("begin_mask", rank), call.flags("end_mask", rank)
    squeezed = call.flags("squeeze_mask", rank)
    plain = slice(None)
    parts: list[tuple[int, slice | int]] = []
    for axis in reversed(range(rank)):
        first = None if from_start[axis] else begin[axis]
        if squeezed[axis]:
            parts.append((axis, first or 0))
        elif (part := slice(first, None if to_end[axis] else end[axis], steps[axis])) not in (
            plain,
            slice(None, None, 1),
        ):
            parts.append((axis, part))

    def run(x: Tensor) -> Tensor:
        for axis, part in parts:
            x = x.select(axis, part) if isinstance(part, int) else _stepped(x, axis, part)
        return x

    return call.bind(run, "x", moves=True)


def _slice_by_size(call: Call) -> Bound:
    begin, sizes = call.ints("begin"), call.ints("size")

    def run(x: Tensor) -> Tensor:
        for axis, (first, size) in enumerate(zip(begin, sizes, strict=True)):
            start = first + x.shape[axis] if first < 0 else first
            x = x.narrow(axis, start, x.shape[axis] - start if size == -1 else size)
        return x

    return call.bind(run, "x", moves=True)


def _slice_update(call: Call) -> Bound:
    rank = call.rank()
    begin, end = call.ints("begin"), call.ints("end")
    steps = call.ints("stride", (1,) * rank)
    from_start, to_end = call.flags("begin_mask", rank), call.flags("end_mask", rank)
    squeezed = call.flags("squeeze_mask", rank)

    def run(x: Tensor, update: Tensor) -> Tensor:
        result = x.clone()
        grids = []
        for axis, side in enumerate(x.shape):
            first = None if from_start[axis] else begin[axis]
            if squeezed[axis]:
                grids.append(torch.tensor([first or 0]))
            else:
                part = slice(first, None if to_end[axis] else end[axis], steps[axis])
                grids.append(torch.arange(side)[part] if steps[axis] > 0 else torch.tensor(range(side)[part]))
        kept = [len(grid) for grid in grids]
        result[torch.meshgrid(*grids, indexing="ij")] = update.reshape(kept)
        return result

    return call.bind(run, "x", "update", moves=True)


def _pad(call: Call) -> Bound:
    flat = call.ints("pad")
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    mode, value = call.text("mode", "constant"), call.number("constant_val", 0.0)
    amounts = [each for pair in reversed(pairs) for each in pair]
    if mode == "constant":
        return call.bind(lambda x: F.pad(x, amounts, value=value), "x", moves=True)

    def run(x: Tensor) -> Tensor:
        # Axis by axis: torch pads at most the last three axes in these modes, and needs two axes before them.
        for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
            side = x.shape[axis]
            places = torch.arange(-before, side + after)
            if mode == "reflect":
                places = places.abs()
                places = torch.where(places < side, places, 2 * (side - 1) - places)
            if before or after:
                x = x.index_select(axis, places.clamp(0, side - 1))
        return x

    return call.bind(run, "x", moves=True)


def _tile(call: Call) -> Bound:
    repeats = call.ints("reps")
    return call.bind(lambda x: x.repeat(repeats), "x", moves=True)


def _reverse(call: Call) -> Bound:
    axes = call.ints("axes", tuple(range(call.rank())))
    return call.bind(lambda x: x.flip(axes), "x", moves=True)


def _flatten2d(call: Call) -> Bound:
    axis = call.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        rows = x.shape[: axis if axis >= 0 else x.dim() + axis].numel()
        return x.reshape(rows, -1)

    return call.bind(run, "x", moves=True)


def _sliding_windows(call: Call) -> Bound:
    axis, size, step = call.integer("axis") % call.rank(), call.integer("size"), call.integer("stride", 1)
    return call.bind(lambda x: x.unfold(axis, size, step).movedim(-1, axis + 1), "x", moves=True)


def _space_to_depth(x: Tensor, size: int) -> Tensor:
    """Move blocks into channels: position in the block first, then channel."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // size, size, width // size, size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * size * size, height // size, width // size)


def _depth_to_space(x: Tensor, size: int) -> Tensor:
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, size, size, channels // size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // size**2, height * size, width * size)


def _by_factor(function: Callable[[Tensor, int], Tensor], name: str) -> Binder:
    def bind(call: Call) -> Bound:
        return call.bind(partial(_swapped, function, call.integer(name)), "x", moves=True)

    return bind


def _swapped(function: Callable[[Tensor, int], Tensor], factor: int, x: Tensor) -> Tensor:
    return function(x, factor)


def _space_to_batch(call: Call) -> Bound:
    (down, across), pads = call.ints("block_shape"), call.ints("paddings")

    def run(x: Tensor) -> Tensor:
        x = F.pad(x, [pads[2], pads[3], pads[0], pads[1]])
        batch, channels, height, width = x.shape
        blocks = x.reshape(batch, channels, height // down, down, width // across, across)
        return blocks.permute(3, 5, 0, 1, 2, 4).reshape(-1, channels, height // down, width // across)

    return call.bind(run, "x", moves=True)


def _batch_to_space(call: Call) -> Bound:
    (down, across), crops = call.ints("block_shape"), call.ints("crops")

    def run(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        blocks = x.reshape(down, across, batch // (down * across), channels, height, width)
        whole = blocks.permute(2, 3, 4, 0, 5, 1).reshape(-1, channels, height * down, width * across)
        return whole[:, :, crops[0] : height * down - crops[1], crops[2] : width * across - crops[3]]

    return call.bind(run, "x", moves=True)


LAYOUT: Mapping[str, Binder] = {
    "batch_to_space": _batch_to_space,
    "concat": _concat,
    "depth_to_space": _by_factor(_depth_to_space, "block_size"),
    "expand_dims": _expand_dims,
    "flatten2d": _flatten2d,
    "identity": lambda call: call.bind(lambda x: x, "x", moves=True),
    "pad": _pad,
    "pixel_shuffle": _by_factor(F.pixel_shuffle, "upscale_factor"),
    "pixel_unshuffle": _by_factor(F.pixel_unshuffle, "downscale_factor"),
    "reshape": _reshape,
    "reshape_like": _reshape_like,
    "reverse": _reverse,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "sliding_windows": _sliding_windows,
    "space_to_batch": _space_to_batch,
    "space_to_depth": _by_factor(_space_to_depth, "block_size"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
