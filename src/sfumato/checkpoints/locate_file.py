"""Locates a single weights file: on this machine, then in the hub cache, then on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import builtin_path
from sfumato.checkpoints.locate import by_patterns, locate_folder
from sfumato.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["PICKLED", "check_file_name", "is_single_file", "locate_file", "text_beside", "vae_beside"]

PICKLED = (".ckpt", ".pt", ".pth", ".bin")

# https://huggingface.co/owner/name/blob/main/folder/file.safetensors, and the same as an id: owner/name/folder/file
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")
_ID = re.compile(r"([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)")


def locate_file(name: str | PathLike[str], **hub: Any) -> Path:
    """Return the local path of a file, downloading it if necessary.

    name: a path, a hub id followed by a file name, or a hub URL (`blob` or `resolve`). Keywords: those of
    `locate_folder`. Raises `CheckpointError`, `DownloadError` or `UsageError`.
    """
    path = builtin_path(name)
    if path.is_file():
        return path
    repo, revision, file = _on_hub(str(name), path)
    if revision is not None:
        hub = {"revision": revision} | hub
    pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in file)
    found = locate_folder(repo, by_patterns(pattern), **hub) / file
    if not found.is_file():
        raise CheckpointError(f"{repo} has no file {file}; check its name")
    return found


def check_file_name(name: str | PathLike[str]) -> None:
    """Raise what `locate_file` would raise for an invalid name, without network access."""
    path = Path(name).expanduser()
    if not path.is_file():
        _on_hub(str(name), path)


def _on_hub(text: str, path: Path) -> tuple[str, str | None, str]:
    """Parse a name into repository, revision and file."""
    plain, on_hub = _URL.subn("", text, count=1)
    if re.match(r"\w+://", plain):
        raise UsageError(f"{text!r} is not a huggingface.co URL; download the file and give its path")
    match = _ID.fullmatch(plain.partition("?")[0])
    if match is None or (not on_hub and (path.is_absolute() or text.startswith((".", "~")) or path.parent.is_dir())):
        raise CheckpointError(
            f"there is no file {text}; give a path, or a hub id with a file such as 'owner/name/file'"
        )
    return match[1], match[2], match[3]


def is_single_file(name: str | PathLike[str]) -> bool:
    """Return whether a name is that of a weights file, local or on the hub, rather than of a folder or repository."""
    return str(name).partition("?")[0].lower().endswith((".safetensors", *PICKLED)) and not Path(name).is_dir()


def text_beside(path: Path, given: str | PathLike[str] | None = None) -> str:
    """Return the text of the original-layout configuration: `given`, or the YAML next to `path`, or an empty string."""
    beside = path.with_suffix(".yaml") if given is None else Path(given).expanduser()
    if given is None and not beside.is_file():
        return ""
    try:
        return beside.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{beside} cannot be read ({error.strerror}); give another configuration") from error


def vae_beside(path: Path) -> Path | None:
    """Return the VAE next to a checkpoint that shares its name, as in A1111: `<stem>*.vae.safetensors`."""
    there = path.parent.iterdir() if path.is_file() else ()
    fitting = (one for one in there if one.name.startswith(path.stem) and one.name.endswith(".vae.safetensors"))
    return min(fitting, default=None)
