"""Recognizes attention in its several ML Program forms and fuses it into one operation.

The core is: a product of queries and keys, optionally times a number, optionally plus a mask, softmax over the keys,
and a product with values ("Attention Is All You Need", arXiv 1706.03762, eq. 1). Axes are named as in einsum equations:
c is contracted between queries q and keys k, d is the remaining axis of the values, and capital letters are batch axes.
`heads.py` then joins attention that a program computes separately by heads or by queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sfumato.coreml.program import Operation, Output, TensorType, Value
from sfumato.coreml.runtime.fuse.graph import Entry, Graph

__all__ = ["ATTENTION", "Core", "fuse_cores"]

ATTENTION = "fused attention"


@dataclass(frozen=True)
class Core:
    """One attention: operands with the letters of their axes, the scale of the scores, and a mask to add to them.

    heads: the number of heads that the axes c and d of all operands hold side by side. mask: has the axes `masked`,
        which are those of the scores (or the last ones), each of full size or 1.
    """

    q: Entry
    k: Entry
    v: Entry
    letters: tuple[str, str, str, str]
    scale: float
    mask: Entry | None = None
    masked: str = ""
    heads: int = 1

    def operation(self, output: Output) -> Operation:
        """Return it as an operation with this output."""
        inputs: dict[str, tuple[Entry, ...]] = {"query": (self.q,), "key": (self.k,), "value": (self.v,)}
        if self.mask is not None:
            inputs["mask"] = (self.mask,)
        attributes = {
            "letters": Value(TensorType("string"), ",".join(self.letters)),
            "masked": Value(TensorType("string"), self.masked),
            "scale": Value(TensorType("fp64"), np.array(self.scale, np.float64)),
            "heads": Value(TensorType("int32"), np.array(self.heads, np.int32)),
        }
        return Operation(ATTENTION, inputs, (output,), attributes)

    @classmethod
    def of(cls, operation: Operation) -> Core:
        """Create a core from such an operation."""
        first, second, third, fourth = str(operation.attributes["letters"].read()).split(",")
        mask = operation.inputs.get("mask", (None,))[0]
        return cls(
            operation.inputs["query"][0],
            operation.inputs["key"][0],
            operation.inputs["value"][0],
            (first, second, third, fourth),
            float(np.ravel(operation.attributes["scale"].read())[0]),  # pyright: ignore[reportArgumentType]
            mask,
            str(operation.attributes["masked"].read()),
            int(np.ravel(operation.attributes["heads"].read())[0]),  # pyright: ignore[reportArgumentType]
        )


@dataclass(frozen=True)
class _Scores:
    """The input of softmax: the product it comes from, the letters of its axes, the scale and the mask."""

    operands: tuple[Entry, Entry]
    letters: tuple[str, str, str]
    scale: float = 1.0
    mask: Entry | None = None
    masked: str = ""


def fuse_cores(graph: Graph) -> None:
    """Replace every attention whose intermediate values are not used elsewhere."""
    for place, product in graph.each("matmul", "einsum"):
        core = _core(graph, product)
        if core is not None:
            graph.replace(place, [core.operation(product.outputs[0])])


def _core(graph: Graph, product: Operation) -> Core | None:
    """Return the attention that ends in this product, or None."""
    found = _product(graph, product)
    if found is None:
        return None
    operands, letters = found
    for weights, values in ((0, 1), (1, 0)):
        softmax = graph.inner(operands[weights], "softmax")
        scores = None if softmax is None else _scores(graph, softmax.inputs["x"][0])
        if softmax is None or scores is None:
            continue
        axis = graph.numbers(softmax, "axis")
        key = scores.letters[2][-1 if axis is None else int(axis[0])]
        # Map the letters of the second product to those of the first, and d for the axis that only it has.
        names = dict(zip(letters[weights], scores.letters[2], strict=True))
        renamed = ["".join(names.get(each, "d") for each in word) for word in (letters[values], letters[2])]
        core = _assembled(scores, operands[values], renamed[0], renamed[1], key)
        if core is not None and _sides_agree(graph, core):
            return core
    return None


def _product(graph: Graph, operation: Operation) -> tuple[tuple[Entry, Entry], tuple[str, str, str]] | None:
    """Return the operands of a product of two, with the letters of their axes and of the result's, else None."""
    if operation.type == "einsum":
        equation, values = graph.text(operation, "equation"), operation.inputs["values"]
        words = [] if equation is None else equation.replace(" ", "").replace("->", ",").split(",")
        if len(words) != 3 or len(values) != 2 or any(not word.isalpha() or len({*word}) < len(word) for word in words):
            return None
        return (values[0], values[1]), _lettered(words)
    x, y = operation.inputs["x"][0], operation.inputs["y"][0]
    rank = len(graph.type(x).shape)
    if rank != len(graph.type(y).shape) or not 2 <= rank <= 6:
        return None
    turns = [graph.numbers(operation, name) for name in ("transpose_x", "transpose_y")]
    batch = "ABCD"[: rank - 2]
    left = "kq" if turns[0] is not None and turns[0][0] else "qk"
    right = "nk" if turns[1] is not None and turns[1][0] else "kn"
    return (x, y), (batch + left, batch + right, batch + "qn")


def _lettered(words: Sequence[str]) -> tuple[str, str, str]:
    """Rename the indices of an equation to capitals, which differ from this module's own letters."""
    names: dict[str, str] = {}
    for word in words:
        for letter in word:
            names.setdefault(letter, chr(ord("A") + len(names)))
    first, second, third = ("".join(names[letter] for letter in word) for word in words)
    return first, second, third


def _scores(graph: Graph, entry: Entry) -> _Scores | None:
    """Trace scores back to a product: the mask is added last, the scale is multiplied before that."""
    moved: list[tuple[int, ...]] = []
    scale, mask, mask_depth = 1.0, None, 0
    while True:
        if (operation := graph.inner(entry, "mul", "real_div")) is not None:
            entry, factor = _scaled(graph, operation)
            if factor is None:
                return None
            scale *= factor
        elif mask is None and scale == 1.0 and (operation := graph.inner(entry, "add")) is not None:
            entry, mask = _masked(graph, operation)
            mask_depth = len(moved)
            if mask is None:
                return None
        elif (operation := graph.inner(entry, "transpose")) is not None:
            perm = graph.numbers(operation, "perm")
            if perm is None:
                return None
            moved.append(tuple(int(axis) for axis in perm))
            entry = operation.inputs["x"][0]
        else:
            break
    product = graph.inner(entry, "matmul", "einsum")
    found = None if product is None else _product(graph, product)
    if found is None:
        return None
    operands, letters = found
    out, at_mask = letters[2], letters[2]
    for depth in range(len(moved), 0, -1):
        out = "".join(out[axis] for axis in moved[depth - 1])
        at_mask = out if depth - 1 >= mask_depth else at_mask
    masked = at_mask[len(at_mask) - len(graph.type(mask).shape) :] if mask is not None else ""
    return _Scores(operands, (letters[0], letters[1], out), scale, mask, masked)


def _scaled(graph: Graph, operation: Operation) -> tuple[Entry, float | None]:
    """Return the value that is multiplied or divided by a constant scalar, and the factor, or None if not constant."""
    x, y = operation.inputs["x"][0], operation.inputs["y"][0]
    factor = graph.scalar(y)
    if operation.type == "real_div":
        factor = None if not factor else 1 / factor
    elif factor is None:
        x, factor = y, graph.scalar(x)
    # A constant with more axes than the values would add axes to them.
    return x, factor if graph.shape(x) == graph.shape(operation.outputs[0].name) else None


def _masked(graph: Graph, operation: Operation) -> tuple[Entry, Entry | None]:
    """Return the scores and the mask of a sum: the mask is the constant summand."""
    x, y = operation.inputs["x"][0], operation.inputs["y"][0]
    shape = graph.shape(operation.outputs[0].name)
    for scores, mask in ((x, y), (y, x)):
        made = graph.inner(scores, "matmul", "einsum", "mul", "real_div", "transpose")
        if made is not None and graph.constant(mask) is not None and graph.shape(scores) == shape:
            return scores, mask
    return x, None


def _assembled(scores: _Scores, values: Entry, of_values: str, of_output: str, key: str) -> Core | None:
    """Return the operands with their letters if each axis has its role in attention, else None."""
    first, second = scores.letters[0], scores.letters[1]
    if (key in first) == (key in second):
        return None
    (q, of_q), (k, of_k) = ((scores.operands[0], first), (scores.operands[1], second))
    if key in first:
        (q, of_q), (k, of_k) = (k, of_k), (q, of_q)
    out = scores.letters[2]
    contracted = [letter for letter in of_q if letter in of_k and letter not in out]
    queries = [letter for letter in of_q if letter not in of_k]
    batch = {letter for letter in of_q if letter in of_k and letter in out}
    if len(contracted) != 1 or len(queries) != 1 or {*of_k} != batch | {key, contracted[0]}:
        return None
    if {*of_values} != batch | {key, "d"} or {*of_output} != batch | {queries[0], "d"}:
        return None
    if any(len({*word}) < len(word) for word in (of_q, of_k, of_values, of_output)):
        return None
    names = str.maketrans({contracted[0]: "c", queries[0]: "q", key: "k"})
    letters = tuple(word.translate(names) for word in (of_q, of_k, of_values, of_output))
    return replace(
        Core(q, k, values, ("", "", "", ""), scores.scale, scores.mask, scores.masked.translate(names)),
        letters=letters,
    )


def _sides_agree(graph: Graph, core: Core) -> bool:
    """Return whether every letter has a single size, so that nothing is broadcast between operands."""
    sides: dict[str, int] = {}
    for entry, word in zip((core.q, core.k, core.v), core.letters, strict=False):
        shape = graph.shape(entry)
        if shape is None or any(
            sides.setdefault(letter, side) != side for letter, side in zip(word, shape, strict=True)
        ):
            return False
    if core.mask is None:
        return True
    shape = graph.shape(core.mask)
    return shape is not None and all(
        side in (1, sides[letter]) for letter, side in zip(core.masked, shape, strict=True)
    )
