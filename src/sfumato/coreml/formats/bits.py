"""Sub-byte integers as weight files store them: packed, least significant bits first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sfumato.coreml.program import ARRAY_DTYPES, SUBBYTE_BITS

__all__ = ["pack", "unpack"]

# Every width divides 24 bits, so numbers are moved in groups that fill three bytes; as many groups at a time as stay in
# a processor's cache.
_GROUP_BITS, _GROUP_BYTES = 24, 3
_AT_ONCE = 2**14


def unpack(data: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """The first `count` numbers of the type (a word of `SUBBYTE_BITS`) in uint8 `data`, as one whole (u)int8 each.

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
    """The bytes (uint8) of whole numbers; the last is filled up with zeros. Bits above the type's are omitted."""
    bits = SUBBYTE_BITS[dtype]
    whole = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    shifts = np.arange(0, _GROUP_BITS, bits, dtype=np.uint32)
    packed = np.empty((-(-whole.size // shifts.size), _GROUP_BYTES), np.uint8)
    for first, part in _groups(whole, shifts.size):
        words = np.bitwise_or.reduce((part & np.uint8(2**bits - 1)).astype(np.uint32) << shifts, axis=1)
        packed[first : first + len(part)] = words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :_GROUP_BYTES]
    return packed.reshape(-1)[: -(-whole.size * bits // 8)]


def _groups(flat: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of `size` bytes, some at a time, each with the number of the first; the last row is filled up with zeros."""
    rows = flat.size // size
    for first in range(0, rows, _AT_ONCE):
        last = min(rows, first + _AT_ONCE)
        yield first, flat[first * size : last * size].reshape(-1, size)
    if flat.size % size:
        yield rows, np.pad(flat[rows * size :], (0, size - flat.size % size)).reshape(1, size)
