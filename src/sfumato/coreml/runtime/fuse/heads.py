"""Merges attention that a program computes separately, by head or by groups of queries, and runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.program import Operation
from sfumato.coreml.runtime.call import Binder, Bound, Call
from sfumato.coreml.runtime.fuse.attention import ATTENTION, Core
from sfumato.coreml.runtime.fuse.graph import Entry, Graph

__all__ = ["FUSED_ATTENTION", "join_attentions"]


def join_attentions(graph: Graph) -> None:
    """Merge attentions over consecutive parts of the same values into one attention over all of them."""
    for place, operation in graph.each("concat"):
        joined = _joined(graph, operation)
        if joined is not None:
            graph.replace(place, [joined.operation(operation.outputs[0])])


def _joined(graph: Graph, concat: Operation) -> Core | None:
    axis, interleaved = graph.numbers(concat, "axis"), graph.numbers(concat, "interleave")
    made = [graph.inner(entry, ATTENTION) for entry in concat.inputs["values"]]
    if axis is None or (interleaved is not None and interleaved[0]):
        return None
    cores = [Core.of(operation) for operation in made if operation is not None]
    first = cores[0] if cores else None
    if first is None or len(cores) < len(made):
        return None
    if any(replace(core, q=first.q, k=first.k, v=first.v, mask=first.mask) != first for core in cores):
        return None
    letter = first.letters[3][int(axis[0])]
    if letter == "q" and first.mask is None and {(core.k, core.v) for core in cores} == {(first.k, first.v)}:
        queries = _whole(graph, [core.q for core in cores], first.letters[0].index("q"), even=False)
        return None if queries is None else replace(first, q=queries)
    if letter != "d" or first.heads != 1 or any(not _same(graph, core.mask, first.mask) for core in cores):
        return None
    if len({_sides(graph, core) for core in cores}) > 1:
        return None
    q = _whole(graph, [core.q for core in cores], first.letters[0].index("c"), even=True)
    k = _whole(graph, [core.k for core in cores], first.letters[1].index("c"), even=True)
    v = _whole(graph, [core.v for core in cores], first.letters[2].index("d"), even=True)
    if q is None or k is None or v is None:
        return None
    return replace(first, q=q, k=k, v=v, heads=len(cores))


def _sides(graph: Graph, core: Core) -> tuple[object, ...]:
    return tuple(graph.shape(entry) for entry in (core.q, core.k, core.v))


def _same(graph: Graph, one: Entry | None, other: Entry | None) -> bool:
    """Return whether two masks are the same value, or equal constants in the program."""
    if one is None or other is None or one == other:
        return one == other
    values = graph.constant(one), graph.constant(other)
    if values[0] is None or values[1] is None or values[0].type != values[1].type:
        return False
    if values[0].stored or values[1].stored:
        return False
    return bool(np.array_equal(values[0].read(), values[1].read()))  # pyright: ignore[reportArgumentType]


def _whole(graph: Graph, parts: Sequence[Entry], axis: int, *, even: bool) -> Entry | None:
    """Return the value that consecutive parts along an axis add up to, else None; even: all must have the same size."""
    found = [_part(graph, entry, axis) for entry in parts]
    parents = {each[0] for each in found if each is not None}
    ranges = [each[1:] for each in found if each is not None]
    if len(parents) != 1 or len(ranges) < len(parts):
        return None
    parent = parents.pop()
    shape = graph.shape(parent)
    bounds = [0, *(stop for _, stop in ranges)]
    if (
        shape is None
        or bounds[-1] != shape[axis]
        or any(start != bounds[place] for place, (start, _) in enumerate(ranges))
    ):
        return None
    if even and len({stop - start for start, stop in ranges}) > 1:
        return None
    return parent


def _part(graph: Graph, entry: Entry, axis: int) -> tuple[Entry, int, int] | None:
    """Return the value that another is a part of along one axis, with its bounds there, else None."""
    if (split := graph.maker(entry, "split")) is not None:
        along = graph.numbers(split, "axis")
        parent = split.inputs["x"][0]
        rank = len(graph.type(parent).shape)
        if along is None or int(along[0]) % rank != axis:
            return None
        start = 0
        for output in split.outputs:
            side = output.type.shape[axis]
            if side is None:
                return None
            if output.name == entry:
                return parent, start, start + side
            start += side
    if (cut := graph.maker(entry, "slice_by_index")) is not None:
        return _cut(graph, cut, axis)
    return None


def _cut(graph: Graph, cut: Operation, axis: int) -> tuple[Entry, int, int] | None:
    """Like `_part` for a slice, which must include all other axes completely."""
    parent = cut.inputs["x"][0]
    shape, part = graph.shape(parent), graph.shape(cut.outputs[0].name)
    begin, end, step = (graph.numbers(cut, name) for name in ("begin", "end", "stride"))
    masks = [graph.numbers(cut, name) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    if shape is None or part is None or begin is None or end is None or len(part) != len(shape):
        return None
    if (step is not None and any(step != 1)) or (masks[2] is not None and any(masks[2])):
        return None
    bounds = []
    for place, side in enumerate(shape):
        first = None if masks[0] is not None and masks[0][place] else int(begin[place])
        last = None if masks[1] is not None and masks[1][place] else int(end[place])
        bounds.append(slice(first, last).indices(side)[:2])
    if any(each != (0, side) for place, (each, side) in enumerate(zip(bounds, shape, strict=True)) if place != axis):
        return None
    return parent, *bounds[axis]


def _bind(call: Call) -> Bound:
    of_q, of_k, of_v, of_output = call.text("letters", "").split(",")
    masked, scale, heads = call.text("masked", ""), call.number("scale"), call.integer("heads")
    batch = [letter for letter in of_q if letter not in "cq"]
    # Torch's fast kernels need (batches, heads, queries, width): two axes before the last two.
    paired = heads == 1 and len(batch) == 2
    orders = [_arranged(word, batch, tail) for word, tail in ((of_q, "qc"), (of_k, "kc"), (of_v, "kd"))]
    splits = [of_q.index("c"), of_k.index("c"), of_v.index("d")]
    back = _back(of_output, batch)
    place = of_output.index("d")

    def one(x: Tensor, which: int) -> Tensor:
        x = x.unflatten(splits[which], (heads, -1)).permute(orders[which])
        if paired:
            x = x.squeeze(2)
        elif len(batch) != 1:
            x = x.flatten(0, len(batch) - 1) if batch else x.unsqueeze(0)
        return x if x.stride(-1) == 1 else x.contiguous()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        sides = [q.shape[of_q.index(letter)] for letter in batch]
        added = None if mask is None else _mask(mask, masked, batch, sides)
        if added is not None:
            added = added.unflatten(0, sides).squeeze(2) if paired else added
        mixed = F.scaled_dot_product_attention(one(q, 0), one(k, 1), one(v, 2), added, scale=scale)
        if paired:
            mixed = mixed.unsqueeze(2)
        elif len(batch) != 1:
            mixed = mixed.unflatten(0, sides) if batch else mixed.squeeze(0)
        return mixed.permute(back).flatten(place, place + 1)

    return call.bind(run, "query", "key", "value", *call.given("mask"))


def _arranged(word: str, batch: Sequence[str], tail: str) -> list[int]:
    """Return the axis order (batches, heads, tail), where the heads come just before c or d."""
    split = next(letter for letter in tail if letter in "cd")
    expanded = word.replace(split, "\0" + split)
    return [expanded.index(letter) for letter in (*batch, "\0", *tail)]


def _back(of_output: str, batch: Sequence[str]) -> list[int]:
    """Return the axis order from (batches, heads, q, d) to the output's, with the heads just before d."""
    axes = {letter: place for place, letter in enumerate((*batch, "\0", "q", "d"))}
    return [axes[letter] for letter in of_output.replace("d", "\0d")]


def _mask(mask: Tensor, masked: str, batch: Sequence[str], sides: Sequence[int]) -> Tensor:
    """Return a mask as (batches, 1, queries, keys), each of full size or 1."""
    wanted = [*batch, "q", "k"]
    present = [letter for letter in wanted if letter in masked]
    mask = mask.permute([masked.index(letter) for letter in present])
    for place, letter in enumerate(wanted):
        if letter not in masked:
            mask = mask.unsqueeze(place)
    if len(batch) > 1:
        mask = mask.expand(*sides, -1, -1).flatten(0, len(batch) - 1)
    mask = mask.unsqueeze(0) if not batch else mask
    return mask.unsqueeze(1)


FUSED_ATTENTION: Mapping[str, Binder] = {ATTENTION: _bind}
