"""Torch's oneDNN operations on packed weights. They are private to torch, so each is tested before use."""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Filter",
    "IntegerFilter",
    "IntegerMatrix",
    "Integers",
    "Scratch",
    "convolve",
    "integers_packable",
    "multiply",
    "multiply_pixels",
    "packable",
    "packed_filter",
    "packed_matrix",
]

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


@cache
def integers_packable(dtype: torch.dtype) -> bool:
    """Return whether packed weights can also be stored as integers here, and be widened for each call."""
    try:
        with torch.no_grad():
            return packable(dtype) and _widens(dtype)
    except Exception:  # as for `packable`
        return False


def _widens(dtype: torch.dtype) -> bool:
    """Check that integers survive packing, widening and unpacking, and multiply like the plain ones."""
    own, scratch = torch.Generator().manual_seed(0), Scratch()
    matrix, filters = (
        torch.randint(-127, 128, shape, generator=own, dtype=torch.int8) for shape in ((24, 40), (24, 40, 3, 3))
    )
    x, pictures = (torch.randn(shape, generator=own).to(dtype) for shape in ((3, 40), (2, 40, 6, 5)))
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    scales, bias = torch.ones(24, dtype=dtype), torch.arange(24).to(dtype)
    rows = IntegerMatrix(matrix, scales, scratch)
    taps = IntegerFilter(filters, scales, (1, 1), (1, 1), scratch)
    pairs = [
        (rows(x, bias), F.linear(x.double(), matrix.double(), bias.double())),
        (rows.plain(), matrix),
        (taps(pictures, None), F.conv2d(pictures.double(), filters.double(), padding=1)),
        (taps.plain(), filters),
    ]
    return all(
        bool((got.double() - want.double()).abs().max() <= TOLERANCE[dtype] * want.double().abs().max())
        for got, want in pairs
    )


class Integers:
    """Packed weights whose values are whole numbers, stored as such, in the same order."""

    def __init__(self, packed: Tensor, kind: torch.dtype) -> None:
        """kind: the integer type."""
        self.shape, self.dtype = packed.shape, packed.dtype
        # oneDNN's description of the order, which depends on the processor.
        self.order = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
        size = torch.ops.mkldnn._nbytes(packed)
        memory = (ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        self.values = torch.frombuffer(memory, dtype=packed.dtype).to(kind)

    @property
    def nbytes(self) -> int:
        """The size in memory."""
        return self.values.nbytes


class Scratch:
    """Memory in which one packed weight at a time is widened; it grows to the largest."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def widened(self, weight: Integers) -> Tensor:
        """Return packed weights for `multiply` or `convolve`, valid until the next call."""
        size = weight.values.numel() * weight.dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._memory[:size].view(weight.dtype).copy_(weight.values)
        return _packed_at(self._memory.data_ptr(), weight)

    def plain(self, weight: Integers) -> Tensor:
        """Return the integers in torch's order."""
        return self.widened(weight).to_dense().to(weight.values.dtype)


def _packed_at(address: int, weight: Integers) -> Tensor:
    """Return packed weights at an address. Torch has this for compiled code only, so it is called as that calls it."""
    create = _torch_library().aoti_torch_create_tensor_from_blob_v2
    shape = weight.shape
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    sizes, steps = ((ctypes.c_int64 * len(shape))(*one) for one in (shape, strides))
    made, kind = ctypes.c_void_p(), {torch.float32: 6, torch.bfloat16: 15}[weight.dtype]
    order, length = ctypes.c_void_p(weight.order.data_ptr()), ctypes.c_int64(weight.order.numel())
    whole, nothing = ctypes.c_int64(len(shape)), ctypes.c_int32(0)
    where = ctypes.c_void_p(address), whole, sizes, steps, ctypes.c_int64(0), ctypes.c_int32(kind), nothing, nothing
    if create(*where, ctypes.byref(made), ctypes.c_int32(_MKLDNN_LAYOUT), order, length):
        raise RuntimeError("torch cannot use packed weights in memory of our own")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    aoti: Any = getattr(torch._C, "_aoti")  # noqa: B009
    return aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(made, None, None))


_MKLDNN_LAYOUT = 3


@cache
def _torch_library() -> ctypes.CDLL:
    return ctypes.CDLL("torch_cpu.dll" if os.name == "nt" else torch._C.__file__)


class IntegerMatrix:
    """The weights (C', C) of a linear layer as integers and scales (C'), packed."""

    def __init__(self, values: Tensor, scales: Tensor, scratch: Scratch) -> None:
        self.scales = scales
        self._scratch = scratch
        self._held = Integers(packed_matrix(values.to(scales.dtype)), values.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer to x (..., C)."""
        return _scaled(multiply(x, self._scratch.widened(self._held), None), self.scales, bias)

    @property
    def nbytes(self) -> int:
        """The size in memory."""
        return self._held.nbytes

    def plain(self) -> Tensor:
        """Return the integers in torch's order."""
        return self._scratch.plain(self._held)


class IntegerFilter:
    """The weights (C', C, h, w) of a convolution as integers and scales (C'), packed for the shape of the input that
    they last saw, like `Filter`.
    """

    def __init__(
        self,
        values: Tensor,
        scales: Tensor,
        padding: Any,
        stride: Any,
        scratch: Scratch,
        on_packed: Callable[[int], object] = lambda size: None,
    ) -> None:
        """on_packed: as in `Filter`."""
        self.scales, self.padding, self.stride = scales, padding, stride
        self._scratch, self._on_packed = scratch, on_packed
        self._held: tuple[Tensor | Integers, torch.Size | None] = values, None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve x (B, C, H, W), which is channels last in memory."""
        held, shape = self._held
        if shape != x.shape or not isinstance(held, Integers):
            values = self.plain()
            held = Integers(
                packed_filter(values.to(self.scales.dtype), self.padding, self.stride, x.shape), values.dtype
            )
            self._held = held, x.shape
            if shape is None:
                self._on_packed(held.nbytes)
        result = convolve(x, self._scratch.widened(held), None, self.padding, self.stride)
        return _scaled(result.permute(0, 2, 3, 1), self.scales, bias).permute(0, 3, 1, 2)

    @property
    def nbytes(self) -> int:
        """The size in memory once packed; 0 before."""
        held, _ = self._held
        return held.nbytes if isinstance(held, Integers) else 0

    def plain(self) -> Tensor:
        """Return the integers in torch's order."""
        held, _ = self._held
        return self._scratch.plain(held) if isinstance(held, Integers) else held


def _scaled(result: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Scale and shift the channels (..., C') of a product with integers in place."""
    return result.mul_(scales) if bias is None else torch.addcmul(bias.detach(), result, scales, out=result)
