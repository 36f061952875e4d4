"""Weight files (`weight.bin`, blob storage version 2), memory-mapped and read on demand.

A file is a header of 64 bytes (uint32 count of records, uint32 version), then records at multiples of 64: uint32
0xDEADBEEF, uint32 type, uint64 bytes, uint64 offset of the data, uint64 unused bits at their end, 32 bytes of zeros.
Programs refer to records by offset. Source: StorageFormat.hpp of Core ML's open source part (BSD-3).
"""

from __future__ import annotations

import mmap
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sfumato.coreml.formats.pointers import check_pointer, check_regular
from sfumato.coreml.formats.values import BLOB_TYPES, array_from_bytes
from sfumato.coreml.program import Value, byte_count
from sfumato.errors import CheckpointError, ConfigError
from sfumato.files import inside

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.coreml.program import TensorType

__all__ = [
    "ALIGNMENT",
    "HEADER",
    "MODEL_PATH",
    "RECORD",
    "SENTINEL",
    "VERSION",
    "BlobFile",
    "BlobWeight",
    "WeightFiles",
]

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
HEADER = struct.Struct("<II56x")
RECORD = struct.Struct("<IIQQQ32x")
# The name of the program's own folder in paths.
MODEL_PATH = "@model_path/"


class BlobFile:
    """A weight file, opened and memory-mapped when the first weight is requested."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._weights: dict[tuple[int, TensorType], BlobWeight] = {}

    @cached_property
    def data(self) -> np.ndarray:
        """All bytes of the file. Writing to them changes a private copy, never the file.

        Raises `CheckpointError` if it is missing, a Git LFS pointer, or not a weight file of version 2.
        """
        check_regular(self.path)
        try:
            data = np.frombuffer(self._mapping, np.uint8)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); copy or download it again") from error
        check_pointer(self.path, data[:64].tobytes())
        if data.size < HEADER.size:
            raise CheckpointError(f"{self.path} ends after {data.size} bytes; copy or download it again")
        _, version = HEADER.unpack(data[: HEADER.size].tobytes())
        if version != VERSION:
            raise CheckpointError(f"{self.path} is not a weight file of version {VERSION}; copy or download it again")
        return data

    @cached_property
    def _mapping(self) -> mmap.mmap:
        with self.path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def let_go(self, start: int, length: int) -> None:
        """Release the memory of a range of bytes, which are read from the file again if needed.

        Changes to these bytes are lost. Does nothing on systems without support (Windows).
        """
        first = start - start % mmap.PAGESIZE
        if sys.platform != "win32":
            self._mapping.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def weight(self, offset: int, type_: TensorType) -> BlobWeight:
        """Return the weight whose record starts at a byte offset; the same object each time.

        Raises `CheckpointError` if there is no such record in the file or its dtype or size differs, and `ConfigError`
        if its dtype is not supported.
        """
        key = (offset, type_)
        if key not in self._weights:
            self._weights[key] = BlobWeight(self, self._start(offset, type_), type_)
        return self._weights[key]

    def _start(self, offset: int, type_: TensorType) -> int:
        size = self.data.size
        where = f"{self.path}: the record at byte {offset}"
        again = "copy or download the model again"
        if offset % ALIGNMENT or offset + RECORD.size > size:
            raise CheckpointError(f"{where} is impossible: the file has {size} bytes; {again}")
        sentinel, number, length, start, _ = RECORD.unpack(self.data[offset : offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise CheckpointError(f"{where} does not start with the expected mark; {again}")
        dtype = BLOB_TYPES.get(number, f"type {number}")
        if dtype != type_.dtype:
            raise CheckpointError(f"{where} contains {dtype}, where the program expects {type_}; {again}")
        if dtype.startswith("fp8"):
            raise ConfigError(
                f"{where} contains {dtype}, which is not supported; convert the model with float16 weights"
            )
        if None in type_.shape or length != byte_count(type_):
            raise CheckpointError(f"{where} contains {length} bytes, where the program expects {type_}; {again}")
        if start < offset + RECORD.size or start + length > size:
            raise CheckpointError(f"{where} ends at byte {start + length} of {size}: the file is cut off; {again}")
        return start


@dataclass(frozen=True, slots=True, eq=False)
class BlobWeight:
    """A tensor in a weight file that starts at a byte offset."""

    file: BlobFile
    start: int
    type: TensorType

    def read(self) -> np.ndarray:
        """Return the values: a view of the mapped file, but small integers are unpacked and bfloat16 is converted."""
        shape = tuple(side or 0 for side in self.type.shape)
        data = self.file.data[self.start : self.start + byte_count(self.type)]
        return array_from_bytes(data, self.type.dtype, shape)

    def let_go(self) -> None:
        """Release the memory that reading has used; existing views stay valid."""
        self.file.let_go(self.start, byte_count(self.type))


class WeightFiles:
    """The weight files next to a program, by their names in the program."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BlobFile] = {}

    def value(self, type_: TensorType, name: str, offset: int) -> Value:
        """Return a constant stored in a weight file, at a record. Raises the same errors as `BlobFile.weight`."""
        if name not in self._files:
            self._files[name] = BlobFile(inside(self._folder, name.removeprefix(MODEL_PATH)))
        return Value(type_, self._files[name].weight(offset, type_))
