"""Adapter and embedding files: their tensors, their metadata, and the hashes that recipes identify them by."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.adapters.named import hash_of_weights
from sfumato.checkpoints.builtin import builtin_name, builtin_path
from sfumato.checkpoints.headers import MOST_HEADER, read_header
from sfumato.checkpoints.weights import mapped_tensors
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import check_file, file_hash, parse_json
from sfumato.values import reason, shown

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

__all__ = ["PICKLED", "Stored", "flattened", "given", "read_stored"]

# Extensions of pickled files, which can contain code.
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """The tensors of a file by name, its metadata, and its SHA-256. path: None for tensors that are not from a file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    sha256: str = ""

    @property
    def where(self) -> str:
        """Its name in error messages."""
        return "the adapter" if self.path is None else builtin_name(self.path)

    @property
    def weights_hash(self) -> str:
        """The hash that A1111 and Civitai use: the SHA-256 of the data after the header, or the one in the metadata."""
        told = self.metadata.get("sshs_model_hash", "")
        if re.fullmatch("[0-9a-f]{64}", told) or self.path is None:
            return told
        return self.sha256 if self.path.suffix in PICKLED else hash_of_weights(self.path)

    def told(self, key: str) -> dict[str, Any]:
        """Return a JSON object from the metadata; empty if it is missing or something else."""
        try:
            return parse_json(self.metadata.get(key) or "{}", self.where)
        except CheckpointError:
            return {}


def read_stored(path: str | PathLike[str], *, pickled: bool = False, hashed: bool = True) -> Stored:
    """Read a file of tensors. Safetensors files are memory-mapped, so their data is read when it is used.

    pickled: allow pickled files, read by torch's restricted unpickler; hashed: compute the file's hash. Raises
    `CheckpointError` if the file is damaged, or pickled without permission, and `UsageError` if `path` is not a path.
    """
    place = builtin_path(path)
    if place.suffix in PICKLED and not pickled:
        raise CheckpointError(
            f"{place} is pickled, and such files can run code when opened; get a safetensors version or, "
            "if you trust its source, pass use_safetensors=False in Python"
        )
    tensors, metadata = (_unpickled(place), {}) if place.suffix in PICKLED else _safetensors(place)
    return Stored(tensors, metadata, place, file_hash(place, None) if hashed else "")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_file(path)
    metadata = read_header(path, MOST_HEADER).metadata
    return dict(mapped_tensors(path, lambda _, stored: stored)), dict(metadata)


def _unpickled(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({reason(error)}); get a safetensors version"
        ) from error
    return flattened(found, path)


def flattened(found: Any, where: object, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return all tensors in nested dictionaries and lists, by their keys joined with dots. Ignores other values."""
    if isinstance(found, Tensor):
        return {prefix.removesuffix(".") or "tensor": found.detach()}
    if depth > 8:
        raise CheckpointError(f"{where} is nested too deeply; get a safetensors version")
    named = isinstance(found, (dict, torch.nn.ParameterDict))
    entries: Any = found.items() if named else enumerate(found) if isinstance(found, list) else ()
    tensors: dict[str, Tensor] = {}
    for key, value in entries:
        tensors |= flattened(value, where, f"{prefix}{key}.", depth + 1)
    return tensors


def given(tensors: Any) -> Stored:
    """Wrap a dictionary of tensors like a file. Raises `UsageError` for anything else."""
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise UsageError(f"an adapter must be a file or a dictionary of tensors by name, not {shown(tensors)}")
    digest = hashlib.sha256(json.dumps(sorted(map(str, tensors))).encode())
    for _, one in sorted((str(key), one) for key, one in tensors.items()):
        digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Stored({str(key): one.detach() for key, one in tensors.items()}, sha256=digest.hexdigest())
