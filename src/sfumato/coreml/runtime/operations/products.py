"""Products of matrices, and attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

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
    equation = str(call.known("equation"))
    return call.bind(lambda *values: torch.einsum(equation, *values), "values")


def _attention(call: Call) -> Bound:
    names = ("query", "key", "value", *call.given("attn_mask"))
    return call.bind(lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask), *names)


PRODUCTS: Mapping[str, Binder] = {
    "einsum": _einsum,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
