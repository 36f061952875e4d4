"""Checks before any file is read: it exists, is a regular file, is not too large, and is not a Git LFS pointer."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SMALL_FILE", "check_pointer", "check_regular", "read_bytes"]

# Size limits in bytes: of manifests and interfaces, and of programs.
SMALL_FILE, LARGE_FILE = 2**26, 2**30
_POINTER = b"version https://git-lfs"


def check_pointer(path: Path, start: bytes | memoryview) -> None:
    """Raise `CheckpointError` if a file with this start is a Git LFS pointer."""
    if bytes(start[: len(_POINTER)]) == _POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its repository, or download it"
        )


def check_regular(path: Path, most: int | None = None) -> None:
    """Raise `CheckpointError` unless the path is a regular file (no pipe, device or folder) of at most `most` bytes."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy or download the model again") from error
    except (OSError, ValueError) as error:  # a name from a damaged file may contain NUL
        raise CheckpointError(f"{path} cannot be read ({error}); copy or download it again") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file; copy or download the model again")
    if most is not None and found.st_size > most:
        raise CheckpointError(
            f"{path} has {found.st_size / 1e6:,.0f} MB, which is too large for such a file; copy or download it again"
        )


def read_bytes(path: Path, most: int = LARGE_FILE) -> bytes:
    """Return the contents of a file. Raises `CheckpointError` if it is missing, too large, unreadable or a pointer."""
    check_regular(path, most)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy or download it again") from error
    check_pointer(path, data)
    return data
