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
    """The request with the adapters that its prompts name, from its `lora_dir`, and prompts without these names.

    Prompts that are drawn together share the weights, so they have to name the same adapters. hashes: how those of the
    adapters begin, by their names in lower case, as far as they are known. Raises `UsageError` for prompts that name
    others, and for a name that no file of the folder has.
    """
    if request.lora_dir is None or request.prompt_syntax != "a1111":
        return request.replace(lora_dir=None)
    read = [named_adapters(prompt) for prompt in request.prompts]
    if any(named != read[0][1] for _, named in read):
        raise UsageError("the prompts name different adapters; draw each prompt in a request of its own")
    names, folder = read[0][1], request.lora_dir
    found = [AdapterFile(file=str(find_adapter(one, folder, hashes)), weight=w, text_weight=t) for one, w, t in names]
    prompt = read[0][0] if isinstance(request.prompt, str) else tuple(one for one, _ in read)
    return request.replace(prompt=prompt, adapters=(*request.adapters, *found), lora_dir=None)


def find_adapter(name: str, folder: str | PathLike[str], hashes: Mapping[str, str] | None = None) -> Path:
    """The safetensors file in a folder, or in one of its folders, that a prompt's `<lora:name:weight>` means.

    By the beginning of its hash, where that is known; else by its stem, or by the name that it was trained under
    (`ss_output_name`); small and capital letters are alike. Raises `UsageError` naming those there are.
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
        raise UsageError(f"there is no adapter {name!r} in {expanded(folder)}{suggest(name, stems)}; there are {there}")
    return found[0]


def moved(files: Sequence[Any], folder: str | PathLike[str]) -> tuple[Any, ...]:
    """Adapters and embeddings whose files are no longer where they were, from a folder, by their hashes.

    files: `AdapterFile`s or `EmbeddingFile`s; those that are in place, or not in the folder either, stay as they are.
    """
    result, there = [], _files(folder)
    for one in files:
        path = expanded(one.file)
        if one.sha256 is not None and not path.is_file():
            # One of the same name is most likely it; the others are read only if it is not.
            likely = sorted(there, key=lambda found, name=path.name: found.name != name)
            found = next((found for found in likely if file_hash(found, None) == one.sha256), None)
            one = one if found is None else one.replace(file=str(found))
        result.append(one)
    return tuple(result)


def hash_of_weights(path: Path) -> str:
    """SHA-256 of a safetensors file after its header, as A1111 and Civitai (AutoV3) have it."""
    with open_file(path, None) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hashes_to(path: Path, beginning: str) -> bool:
    """Whether a hash begins so: one that a file tells, that of its weights (AutoV3), or that of the file (AutoV2)."""
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
