"""Adapters named in a prompt, and adapter files that have moved. Does not import torch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.headers import MOST_HEADER, read_header
from sfumato.errors import CheckpointError, UsageError, suggest
from sfumato.files import expanded, file_hash, open_file
from sfumato.request import AdapterFile
from sfumato.text.grammars import named_adapters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    from sfumato.request import GenerateRequest

__all__ = ["find_adapter", "hash_of_weights", "hashes_to", "moved", "with_named_adapters"]


def with_named_adapters(request: GenerateRequest, hashes: Mapping[str, str] | None = None) -> GenerateRequest:
    """Move the adapters named in the prompts to the request's adapters, with their files in `lora_dir`.

    All prompts of a request share the weights, so they must name the same adapters. hashes: known beginnings of the
    adapters' hashes, by name in lower case. Raises `UsageError` if the prompts name different adapters, and if the
    folder has no file for a name.
    """
    if request.lora_dir is None or request.prompt_syntax != "a1111":
        return request if request.lora_dir is None else request.replace(lora_dir=None)
    read = [named_adapters(prompt) for prompt in request.prompts]
    if any(named != read[0][1] for _, named in read):
        raise UsageError("the prompts name different adapters; use a separate request for each prompt")
    names, folder = read[0][1], request.lora_dir
    found = [AdapterFile(file=str(find_adapter(one, folder, hashes)), weight=w, text_weight=t) for one, w, t in names]
    prompt = read[0][0] if isinstance(request.prompt, str) else tuple(one for one, _ in read)
    return request.replace(prompt=prompt, adapters=(*request.adapters, *found), lora_dir=None)


def find_adapter(name: str, folder: str | PathLike[str], hashes: Mapping[str, str] | None = None) -> Path:
    """Find the safetensors file for a prompt's `<lora:name:weight>` in a folder or its subfolders.

    Searches by the beginning of its hash, if known, or else by its stem or the name it was trained under
    (`ss_output_name`), ignoring case. Raises `UsageError`, which lists the available names.
    """
    files, wanted = _files(folder), name.lower()
    sha256 = (hashes or {}).get(wanted)
    found = [path for path in files if path.stem.lower() == wanted]
    found = found or [path for path in files if _metadata(path).get("ss_output_name", "").lower() == wanted]
    likely = sorted(files, key=lambda path: path not in found)
    same = next((path for path in likely if sha256 and hashes_to(path, sha256)), None)
    found = found if same is None else [same]
    if not found:
        stems = [path.stem for path in files]
        there = ", ".join(stems[:6]) or "no such files"
        raise UsageError(f"there is no adapter {name!r} in {expanded(folder)}{suggest(name, stems)}; found {there}")
    return found[0]


def moved(files: Sequence[Any], folder: str | PathLike[str]) -> tuple[Any, ...]:
    """Find adapters and embeddings whose files have moved, in a folder, by their hashes.

    files: `AdapterFile`s or `EmbeddingFile`s. Files that have not moved or are not in the folder stay unchanged.
    """
    result, there = [], _files(folder)
    for one in files:
        path = expanded(one.file)
        if one.sha256 is not None and not path.is_file():
            # A file of the same name is most likely the right one. The others are read only if it is not.
            likely = sorted(there, key=lambda found, name=path.name: found.name != name)
            found = next((found for found in likely if file_hash(found, None) == one.sha256), None)
            one = one if found is None else one.replace(file=str(found))
        result.append(one)
    return tuple(result)


def hash_of_weights(path: Path) -> str:
    """Return the SHA-256 of a safetensors file after its header, as used by A1111 and Civitai (AutoV3)."""
    with open_file(path, None) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hashes_to(path: Path, beginning: str) -> bool:
    """Return whether a hash of a file begins with a text: one in its metadata, its AutoV3, or its AutoV2 hash."""
    told = _metadata(path)
    if any(told.get(key, "").startswith(beginning) for key in ("sshs_model_hash", "sshs_legacy_hash")):
        return True
    return hash_of_weights(path).startswith(beginning) or file_hash(path, None).startswith(beginning)


def _metadata(path: Path) -> Mapping[str, str]:
    try:
        return read_header(path, MOST_HEADER).metadata
    except CheckpointError:
        return {}


def _files(folder: str | PathLike[str]) -> list[Path]:
    return sorted(path for path in expanded(folder).rglob("*.safetensors") if path.is_file())
