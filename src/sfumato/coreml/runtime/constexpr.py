"""Compressed weights: the `constexpr_…` operations of iOS 16 (attributes) and iOS 18 (inputs).

Sub-byte numbers are unpacked on reading, except those of iOS 16, which are packed into plain uint8, starting at the
lowest bits. Everything is computed in the type of the result, as specified (coremltools' `compression.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

from sfumato.coreml.formats.bits import unpack
from sfumato.coreml.runtime.call import Call

__all__ = ["CONSTEXPR"]

_Arrays = tuple[np.ndarray, ...]


def _blocks(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat one value per block to fill a shape."""
    for axis, (side, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        if 1 < side < wanted:  # axes of size 1 are broadcast on use
            values = np.repeat(values, wanted // side, axis)
    return values


def _lut_to_dense(call: Call) -> _Arrays:
    indices, table = call.known("indices"), call.known("lut")
    if not call.given("shape"):
        axis = call.integer("vector_axis", 0)
        return (_looked_up(indices, table, axis),)
    shape = call.ints("shape")
    bits, count = int(table.size).bit_length() - 1, prod(shape)
    places = indices[:count] if bits == 8 else unpack(indices, f"uint{bits}", count)
    return (table[places].reshape(shape),)


def _looked_up(indices: np.ndarray, table: np.ndarray, axis: int) -> np.ndarray:
    """Look up indices as in iOS 18: one table per block of indices, with scalars, or vectors laid out along an axis."""
    *grid, entries, length = table.shape
    flat = table.reshape(-1, length)
    blocks = prod(grid)
    if blocks > 1:
        first = _blocks(np.arange(blocks, dtype=np.int32).reshape(grid) * entries, indices.shape)
        indices = indices + first
    if length == 1:
        return flat[:, 0][indices]
    axis %= indices.ndim
    vectors = np.moveaxis(flat[indices], -1, axis + 1)
    shape = list(indices.shape)
    shape[axis] *= length
    return vectors.reshape(shape)


def _affine_dequantize(call: Call) -> _Arrays:
    data, scale, zero = call.known("quantized_data"), call.known("scale"), call.known("zero_point")
    axis = call.integer("axis")
    shape = [1] * data.ndim
    shape[axis] = -1
    scale, zero = (each.reshape(shape) if np.size(each) > 1 else np.reshape(each, ()) for each in (scale, zero))
    return ((data.astype(scale.dtype) - zero.astype(scale.dtype)) * scale,)


def _shifted(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    values = data.astype(scale.dtype)
    if offset is not None:
        values = values - _blocks(offset, data.shape)
    return _blocks(scale, data.shape) * values


def _blockwise_shift_scale(call: Call) -> _Arrays:
    return (
        _shifted(call.known("data"), call.known("scale"), call.known("offset", None)).astype(call.known("scale").dtype),
    )


def _dense(nonzero: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = np.zeros(mask.shape, nonzero.dtype)
    values[mask != 0] = nonzero
    return values


def _sparse_to_dense(call: Call) -> _Arrays:
    nonzero, mask = call.known("nonzero_data"), call.known("mask")
    if call.given("shape"):
        shape = call.ints("shape")
        mask = unpack(mask, "uint1", prod(shape)).reshape(shape)
    return (_dense(nonzero, mask),)


def _lut_to_sparse(call: Call) -> _Arrays:
    mask, table = call.known("indices_mask"), call.known("lut")
    axis = call.integer("vector_axis", 0)
    values = _looked_up(_dense(call.known("indices_nonzero_data"), mask), table, axis)
    if table.shape[-1] > 1:
        mask = np.repeat(mask, table.shape[-1], axis)
    return mask, values[mask != 0]


def _sparse_blockwise_shift_scale(call: Call) -> _Arrays:
    mask, scale = call.known("data_mask"), call.known("scale")
    values = _shifted(_dense(call.known("nonzero_data"), mask), scale, call.known("offset", None))
    return mask, values[mask != 0]


def _cast(call: Call) -> _Arrays:
    return (call.known("source_val").astype(np.float32),)


CONSTEXPR: Mapping[str, Callable[[Call], _Arrays]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
