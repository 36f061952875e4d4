"""Safetensors headers: names, dtypes, shapes and a few values, read without torch and without loading weights."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from sfumato.errors import CheckpointError
from sfumato.files import open_file, parse_json
from sfumato.values import reason, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["MOST_HEADER", "Header", "Stored", "read_header"]

# A header takes about a hundred bytes per tensor; that of a whole checkpoint may also contain an image.
MOST_HEADER, LONGEST = 2**24, 2**27
FEW = 2**16


@dataclass(frozen=True)
class Stored:
    """A tensor as described by the header: dtype, shape, and the begin and end of its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin

    def is_floating_point(self) -> bool:
        """Return whether the dtype is floating point, like `torch.Tensor.is_floating_point`."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Header:
    """A parsed header. start: the offset of the data section. loaded: the tensors, if they are already in memory."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    start: int = 0
    loaded: Mapping[str, Any] | None = None

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a small tensor's values; empty if it is absent, large, or in a dtype that only torch reads."""
        stored = self.tensors.get(name)
        if stored is not None and self.loaded is not None:
            return tuple(self.loaded[name].flatten().tolist())
        if stored is None or stored.count > FEW or stored.dtype not in ("F64", "F32", "F16", "BF16"):
            return ()
        with open_file(self.path, None) as stream:
            stream.seek(self.start + stored.begin)
            raw = stream.read(stored.bytes)
        if stored.dtype == "BF16":  # the upper half of a float32
            raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        return struct.unpack(f"<{stored.count}{ {'F64': 'd', 'F16': 'e'}.get(stored.dtype, 'f') }", raw)


def read_header(path: Path, most: int = LONGEST) -> Header:
    """Read and validate a file's header of at most `most` bytes.

    Raises `CheckpointError` if the file is missing, truncated or not safetensors, or if offsets and shapes disagree.
    """
    try:
        if not path.exists():
            raise ValueError("it is not there")
        with open_file(path, None) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, most):
                raise ValueError("it does not begin with a header")
            tensors, metadata = _read(stream.read(length))
        there, wanted = size - 8 - length, max((stored.end for stored in tensors.values()), default=0)
        if wanted <= there < sum(stored.bytes for stored in tensors.values()):
            raise ValueError("tensors overlap")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({reason(error)}); download or copy it again"
        ) from error
    if wanted > there:
        raise CheckpointError(
            f"{path} is truncated: {there:,} of its {wanted:,} bytes of tensors are present; download or copy it again"
        )
    return Header(path, tensors, metadata, 8 + length)


def _read(text: bytes) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        entries = parse_json(text, "the header")
    except CheckpointError as error:
        raise ValueError("its header is not a JSON object") from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not a JSON object")
    tensors = {name: _described(name, entry) for name, entry in entries.items()}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _described(name: str, entry: Any) -> Stored:
    """Parse one header entry. Raises `ValueError` if it is malformed."""
    told = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (told.get(key) for key in ("dtype", "shape", "data_offsets"))
    found = re.fullmatch(r"[A-Z]+(\d*)(_\w+)?", dtype) if isinstance(dtype, str) else None
    if found is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} has no type, shape and offsets")
    stored = Stored(found[0], tuple(shape), *offsets)
    # Except for BOOL, dtype names contain their number of bits ("BF16", "F8_E4M3").
    if stored.bytes != stored.count * int(found[1] or 8) // 8:
        raise ValueError(f"{shown(name)} has impossible offsets")
    return stored


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 16 and all(type(one) is int and 0 <= one < 2**48 for one in value)
