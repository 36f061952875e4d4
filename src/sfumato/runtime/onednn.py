"""Torch's oneDNN operations on packed weights. They are private to torch, so each is tested before use."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Filter", "convolve", "multiply", "multiply_pixels", "packable", "packed_filter", "packed_matrix"]

# The error that one rounding may cause, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@cache
def packable(dtype: torch.dtype) -> bool:
    """Return whether the operations below exist in this version of torch and give correct results for this dtype."""
    if not torch.backends.mkldnn.is_available() or dtype not in TOLERANCE:
        return False
    try:
        with torch.no_grad():
            return _agrees(dtype)
    except Exception:  # torch versions that lack them or changed their signatures raise various errors
        return False


def _agrees(dtype: torch.dtype) -> bool:
    """Compare small products and convolutions to torch's plain layers, and check that weights can be unpacked."""
    own = torch.Generator().manual_seed(0)
    shapes = (3, 5, 32), (16, 32), (16,), (2, 16, 6, 5), (16, 16, 3, 3)
    x, matrix, bias, pictures, filters = (torch.randn(shape, generator=own).to(dtype) for shape in shapes)
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    multiplied, convolved = packed_matrix(matrix), packed_filter(filters, (1, 1), (2, 2), pictures.shape)
    pairs = [
        (multiplied.to_dense(), matrix),
        (convolved.to_dense(), filters),
        (multiply(x, multiplied, bias), F.linear(x.double(), matrix.double(), bias.double())),
        (multiply(x, multiplied, None), F.linear(x.double(), matrix.double())),
    ]
    for some in (bias, None):
        wide = None if some is None else some.double()
        want = F.conv2d(pictures.double(), filters.double(), wide, stride=2, padding=1)
        pairs.append((convolve(pictures, convolved, some, (1, 1), (2, 2)), want))
    return all(
        got.dtype == dtype
        and got.shape == want.shape
        and bool((got.double() - want.double()).abs().max() <= TOLERANCE[dtype] * want.double().abs().max())
        for got, want in pairs
    )


def packed_matrix(weight: Tensor) -> Tensor:
    """Pack the weights (C', C) of a linear layer for `multiply`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer with packed weights to x (..., C)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def multiply_pixels(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to every pixel of x (B, C, H, W); the result is channels last."""
    return multiply(x.permute(0, 2, 3, 1).contiguous(), packed, bias).permute(0, 3, 1, 2)


def packed_filter(weight: Tensor, padding: Any, stride: Any, size: Sequence[int]) -> Tensor:
    """Pack the weights (C', C, h, w) of a convolution with this padding and stride for `convolve`.

    size: (B, C, H, W), the shape of its input. The best order of the weights depends on it, also on B.
    """
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, list(padding), list(stride), [1, 1], 1, list(size))


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, padding: Any, stride: Any) -> Tensor:
    """Apply a convolution with packed weights to x (B, C, H, W), which is channels last in memory."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")


class Filter:
    """The weights (C', C, h, w) of a convolution, packed for the shape of the input that they last saw.

    For another shape, oneDNN would reorder them in every call, one value at a time where it has no faster way: up to 25
    times as long as the convolution itself (docs/log.md).
    """

    def __init__(
        self, weight: Tensor, padding: Any, stride: Any, on_packed: Callable[[int], object] = lambda size: None
    ) -> None:
        """on_packed: called with the size in bytes when packed weights replace the plain ones."""
        self.dtype, self.padding, self.stride = weight.dtype, padding, stride
        self._on_packed = on_packed
        self._packed: tuple[Tensor, torch.Size | None] = weight, None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve x (B, C, H, W), which is channels last in memory."""
        weight, shape = self._packed
        if shape != x.shape:
            weight = packed_filter(self.to_dense(), self.padding, self.stride, x.shape)
            self._packed = weight, x.shape
            if shape is None:
                self._on_packed(weight.element_size() * weight.numel())
        return convolve(x, weight, bias, self.padding, self.stride)

    def to_dense(self) -> Tensor:
        """Return the weights as a plain tensor."""
        weight, _ = self._packed
        return weight.to_dense() if weight.is_mkldnn else weight
