"""The compiled kernels as functions on tensors, each equivalent to a few lines of torch."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_double, c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from sfumato.kernels.build import CompilerError, loaded

__all__ = ["LANES", "Kernels", "kernels_for"]

# Channels must fill whole vectors; the widest hold sixteen floats.
LANES = 16


class _Strides(ctypes.Structure):
    """Strides in elements between images, heads and rows; the struct `strides` of attention.c."""

    _fields_ = (("batch", c_int64), ("heads", c_int64), ("row", c_int64))


class Kernels:
    """The kernels for one dtype, on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Load the library, building it if necessary. Raises `CompilerError` if that fails."""
        self.dtype = dtype
        library = loaded(bfloat16=dtype == torch.bfloat16)
        self._attention, self._group_norm, self._geglu = library.attention, library.group_norm, library.geglu
        self._attention.argtypes = [*[c_void_p] * 5, *[c_int64] * 5, *[_Strides] * 5, c_float]
        self._group_norm.argtypes = [*[c_void_p] * 5, *[c_int64] * 4, c_double, c_int64]
        self._geglu.argtypes = [c_void_p, c_void_p, c_int64, c_int64]
        self._geglu.restype = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(d) + mask) v; shapes are as in models/attention.py.

        Heads may be interleaved in memory, as projections leave them. The result (B, heads, L, d) is interleaved so
        that `out.transpose(1, 2).flatten(2)` copies nothing.
        """
        batch, heads, queries, depth = q.shape
        keys = k.shape[2]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty((batch, queries, heads, depth)).transpose(1, 2)
        if mask is not None:
            mask = mask.float().expand(batch, heads, queries, keys)
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = [_Strides(*x.stride()[:3]) for x in (q, k, v, out)]
        status = self._attention(
            *(x.data_ptr() for x in (q, k, v, out)),
            None if mask is None else mask.data_ptr(),
            *(batch, heads, queries, keys, depth),
            *strides,
            _Strides(0, 0, 0) if mask is None else _Strides(*mask.stride()[:3]),
            1 / math.sqrt(depth),
        )
        return _checked(status, out)

    def group_norm(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None, *, silu: bool
    ) -> Tensor:
        """Return `group_norm(x + added)`, followed by SiLU if `silu`.

        x: (B, C, H, W) in channels_last, C a multiple of `LANES`; added: (B, C); weight, bias and added are float32.
        """
        batch, channels, height, width = x.shape
        out = torch.empty_like(x)
        pointers = [x, added, weight, bias, out]
        sizes = (batch, height * width, channels, groups)
        status = self._group_norm(*(None if p is None else p.data_ptr() for p in pointers), *sizes, eps, silu)
        return _checked(status, out)

    def geglu(self, x: Tensor) -> Tensor:
        """Return the first half of the last dimension times the GELU of the second: (..., 2C) -> (..., C), contiguous.

        C is a multiple of `LANES`.
        """
        x, width = x.contiguous(), x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], width))
        self._geglu(x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1], width)
        return out


def kernels_for(dtype: torch.dtype) -> Kernels:
    """Return the kernels for a dtype, loaded once. Raises `CompilerError` if they cannot be built; builds only once."""
    found = _attempted(dtype)
    if isinstance(found, CompilerError):
        raise found
    return found


@cache
def _attempted(dtype: torch.dtype) -> Kernels | CompilerError:
    try:
        return Kernels(dtype)
    except CompilerError as error:
        return error


def _checked(status: int, out: Tensor) -> Tensor:
    if status:
        raise MemoryError("there is not enough memory for a kernel's workspace")
    return out
