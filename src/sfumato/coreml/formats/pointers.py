"""Telling files that are not there from those that are only a note of where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_pointer", "read_bytes"]

_POINTER = b"version https://git-lfs"


def check_pointer(path: Path, start: bytes | memoryview) -> None:
    """Raise `CheckpointError` if a file that starts so is a pointer of Git's large file storage."""
    if bytes(start[: len(_POINTER)]) == _POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its repository, or download it"
        )


def read_bytes(path: Path) -> bytes:
    """All bytes of a file. Raises `CheckpointError` if it is missing, cannot be read, or is a pointer."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy or download the model again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy or download it again") from error
    check_pointer(path, data)
    return data
