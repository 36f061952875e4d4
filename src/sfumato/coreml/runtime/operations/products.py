"""Matrix products and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.coreml.program import Value
from sfumato.coreml.runtime.call import Binder, Bound, Call

__all__ = ["PRODUCTS"]


def _linear(call: Call) -> Bound:
    return call.bind(F.linear, "x", "weight", *call.given("bias"))


def _turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) if x.dim() > 1 else x


def _matmul(call: Call) -> Bound:
    turns = call.flag("transpose_x"), call.flag("transpose_y")
    if turns == (False, False):
        return call.bind(torch.matmul, "x", "y")
    if turns == (False, True):
        return call.bind(lambda x, y: torch.matmul(x, _turned(y)), "x", "y")
    if turns == (True, False):
        return call.bind(lambda x, y: torch.matmul(_turned(x), y), "x", "y")
    return call.bind(lambda x, y: torch.matmul(_turned(x), _turned(y)), "x", "y")


def _einsum(call: Call) -> Bound:
    equation = str(call.known("equation")).replace(" ", "")
    words, _, result = equation.partition("->")
    letters = words.split(",")
    shapes = [
        entry.type.shape if isinstance(entry, Value) else call.types[entry].shape for entry in call.entries("values")
    ]
    run = _batched(letters, result) if len(letters) == 2 and _agree(letters, shapes) else None
    return call.bind(run or (lambda *values: torch.einsum(equation, *values)), "values")


def _agree(words: Sequence[str], shapes: Sequence[tuple[int | None, ...]]) -> bool:
    """Return whether each letter has a single size, so that nothing is broadcast."""
    sides: dict[str, int | None] = {}
    pairs = [pair for word, shape in zip(words, shapes, strict=True) for pair in zip(word, shape, strict=False)]
    return all(side is not None and sides.setdefault(letter, side) == side for letter, side in pairs)


def _batched(words: Sequence[str], result: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a function that computes a sum of products as a batched matrix product, or None if it is not one.

    Letters that only the first operand has come last in memory, where `einsum` puts those of the second: for scores
    these are the keys, which softmax sums over, and for the attention output the channels, which projections read.
    """
    first, second = words
    batch = [letter for letter in first if letter in second and letter in result]
    summed = [letter for letter in first if letter in second and letter not in result]
    left = [letter for letter in first if letter not in second]
    right = [letter for letter in second if letter not in first]
    made = [*batch, *right, *left]
    if sorted(made) != sorted(result) or any(len({*word}) < len(word) for word in words):
        return None
    of_first, of_second = (
        [word.index(one) for one in order]
        for word, order in ((first, [*batch, *summed, *left]), (second, [*batch, *right, *summed]))
    )
    back = [made.index(letter) for letter in result]
    shared, after, own = len(batch), len(batch) + len(summed), len(batch) + len(right)

    def run(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.permute(of_first), y.permute(of_second)
        batches, sums, columns, rows = x.shape[:shared], x.shape[shared:after], x.shape[after:], y.shape[shared:own]
        b, s, c, r = (sides.numel() for sides in (batches, sums, columns, rows))
        product = torch.bmm(y.reshape(b, r, s), x.reshape(b, s, c))
        return product.reshape(*batches, *rows, *columns).permute(back)

    return run


def _attention(call: Call) -> Bound:
    names = ("query", "key", "value", *call.given("attn_mask"))
    return call.bind(lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask), *names)


PRODUCTS: Mapping[str, Binder] = {
    "einsum": _einsum,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
