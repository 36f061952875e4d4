"""Writes weight files with one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sfumato.coreml.formats.blobs import ALIGNMENT, HEADER, RECORD, SENTINEL, VERSION
from sfumato.coreml.formats.values import BLOB_TYPES, bytes_from_array, checked
from sfumato.coreml.program import SUBBYTE_BITS

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.coreml.program import Value

__all__ = ["BlobWriter", "StoreWeight"]

# Writes a constant's values to a weight file, and returns the file's name in the program and the byte offset.
StoreWeight = Callable[["Value"], tuple[str, int]]

_NUMBERS = {dtype: number for number, dtype in BLOB_TYPES.items()}


class BlobWriter:
    """A new weight file, created when the first value is added. Use it in a `with` block, which closes it.

    Values with the same data object share one record. Raises `OSError` if writing fails, which the caller turns into
    an `OutputError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = None
        self._count = 0
        self._offsets: dict[tuple[int, str], tuple[int, object]] = {}

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._file is None:
            return
        with self._file as file:
            if failure[0] is None:
                file.seek(0)
                file.write(HEADER.pack(self._count, VERSION))

    def add(self, value: Value) -> int:
        """Write a constant's values and return the byte offset of their record."""
        key = (id(value.data), value.type.dtype)
        if key not in self._offsets:
            # Keep the data alive for as long as its id is used as key.
            self._offsets[key] = (self._write(value), value.data)
        return self._offsets[key][0]

    def _write(self, value: Value) -> int:
        dtype, numbers = value.type.dtype, np.asarray(checked(value))
        data = bytes_from_array(numbers, dtype)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
            self._file.write(HEADER.pack(0, VERSION))
        offset = self._file.tell()
        unused = data.nbytes * 8 - numbers.size * SUBBYTE_BITS[dtype] if dtype in SUBBYTE_BITS else 0
        self._file.write(RECORD.pack(SENTINEL, _NUMBERS[dtype], data.nbytes, offset + RECORD.size, unused))
        self._file.write(data.data)
        self._file.write(bytes(-data.nbytes % ALIGNMENT))
        self._count += 1
        return offset
