"""Locates a single weights file: on this machine, then in the hub cache, then on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import by_patterns, locate_folder
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import expanded

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["PICKLED", "check_file_name", "is_single_file", "locate_file", "text_beside", "vae_beside"]

PICKLED = (".ckpt", ".pt", ".pth", ".bin")

# https://huggingface.co/owner/name/blob/main/folder/file.safetensors, and the same as an id: owner/name/folder/file
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")
_ID = re.compile(r"([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)")


def locate_file(name: str | PathLike[str], **hub: Any) -> Path:
    """The file on this machine, downloaded if necessary.

    name: a path, a hub id with the file's name behind it, or a URL of the hub (`blob` or `resolve`). Keywords are those
    of `locate_folder`. Raises `CheckpointError`, `DownloadError` or `UsageError`.
    """
    path = expanded(name)
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
    """Raise what `locate_file` would for a name that is neither a file nor one on the hub; uses no network."""
    path = Path(name).expanduser()
    if not path.is_file():
        _on_hub(str(name), path)


def _on_hub(text: str, path: Path) -> tuple[str, str | None, str]:
    """The repository, revision and file that a name stands for."""
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
    """Whether a name is that of a file with weights, here or on the hub, rather than of a folder or a repository."""
    return str(name).partition("?")[0].lower().endswith((".safetensors", *PICKLED)) and not Path(name).is_dir()


def text_beside(path: Path, given: str | PathLike[str] | None = None) -> str:
    """The configuration of the original layout: the one given, or the YAML file beside a checkpoint, or nothing."""
    beside = path.with_suffix(".yaml") if given is None else Path(given).expanduser()
    if given is None and not beside.is_file():
        return ""
    try:
        return beside.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{beside} cannot be read ({error.strerror}); give another configuration") from error


def vae_beside(path: Path) -> Path | None:
    """The VAE that lies beside a checkpoint under its name, as A1111 has it: `<stem>*.vae.safetensors`."""
    there = path.parent.iterdir() if path.is_file() else ()
    fitting = (one for one in there if one.name.startswith(path.stem) and one.name.endswith(".vae.safetensors"))
    return min(fitting, default=None)
