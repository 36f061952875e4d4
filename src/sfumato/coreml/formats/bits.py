"""Sub-byte integers as weight files store them: packed, least significant bits first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sfumato.coreml.program import ARRAY_DTYPES, SUBBYTE_BITS

__all__ = ["pack", "unpack"]

# Every width divides 24 bits, so numbers are processed in groups of three bytes, and in blocks of groups that fit in
# the CPU's cache.
_GROUP_BITS, _GROUP_BYTES = 24, 3
_AT_ONCE = 2**14


def unpack(data: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Unpack the first `count` numbers of a dtype in `SUBBYTE_BITS` from uint8 `data` to one (u)int8 each.

    Raises `ValueError` if there are fewer.
    """
    bits = SUBBYTE_BITS[dtype]
    if data.size * 8 < count * bits:
        raise ValueError(f"{data.size} bytes do not hold {count} numbers of type {dtype}")
    shifts = np.arange(0, _GROUP_BITS, bits, dtype=np.uint32)
    groups = _groups(data[: -(-count * bits // 8)].reshape(-1), _GROUP_BYTES)
    numbers = np.empty((-(-count // shifts.size), shifts.size), np.uint8)
    for first, part in groups:
        words = part[:, 0] | part[:, 1].astype(np.uint32) << 8 | part[:, 2].astype(np.uint32) << 16
        numbers[first : first + len(part)] = (words[:, None] >> shifts) & (2**bits - 1)
    whole = numbers.reshape(-1)[:count]
    if ARRAY_DTYPES[dtype] == np.int8:
        sign = np.uint8(2 ** (bits - 1))
        return ((whole ^ sign) - sign).view(np.int8)
    return whole


def pack(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Pack integers into bytes (uint8), the last one padded with zeros. Bits beyond the dtype's width are dropped."""
    bits = SUBBYTE_BITS[dtype]
    whole = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    shifts = np.arange(0, _GROUP_BITS, bits, dtype=np.uint32)
    packed = np.empty((-(-whole.size // shifts.size), _GROUP_BYTES), np.uint8)
    for first, part in _groups(whole, shifts.size):
        words = np.bitwise_or.reduce((part & np.uint8(2**bits - 1)).astype(np.uint32) << shifts, axis=1)
        packed[first : first + len(part)] = words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :_GROUP_BYTES]
    return packed.reshape(-1)[: -(-whole.size * bits // 8)]


def _groups(flat: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of rows of `size` bytes, with the index of the first row; the last row is padded with zeros."""
    rows = flat.size // size
    for first in range(0, rows, _AT_ONCE):
        last = min(rows, first + _AT_ONCE)
        yield first, flat[first * size : last * size].reshape(-1, size)
    if flat.size % size:
        yield rows, np.pad(flat[rows * size :], (0, size - flat.size % size)).reshape(1, size)
