"""Reading and writing files so that a bad one is named and a new one is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, OutputError, SfumatoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

__all__ = [
    "LAYOUT_VERSION",
    "cache_folder",
    "check_writable",
    "inside",
    "output_folder",
    "read_json",
    "replacing",
    "write_json",
]

# Folders are written in the layout of this version of the ecosystem's library, which reads the number.
LAYOUT_VERSION = "0.42.1"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` if it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete checkpoint folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object. Raises `OutputError` if it cannot be written."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where what can be made again is kept: $SFUMATO_CACHE, else the system's place for the user's caches. Not made."""
    if chosen := os.environ.get("SFUMATO_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sfumato"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sfumato"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


def output_folder(path: str | PathLike[str]) -> Path:
    """The folder, made if need be. Raises `OutputError` if it cannot be."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(_cannot_write(folder, error)) from error
    return folder


def check_writable(folder: Path) -> None:
    """Raise `OutputError` if a file could not be written into the folder, made if need be; touches nothing."""
    nearest = folder.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    code = errno.ENOTDIR if not os.path.isdir(nearest) else 0 if os.access(nearest, os.W_OK | os.X_OK) else errno.EACCES
    if code:
        raise OutputError(_cannot_write(folder, OSError(code, f"{nearest} is not a folder")))


def inside(folder: Path, name: str) -> Path:
    """A file of the folder by a name read from another file. Raises `CheckpointError` if it leads elsewhere."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if not name or windows.anchor or posix.is_absolute() or ".." in windows.parts:
        raise CheckpointError(f"{folder}: the file name {name!r} leads out of the folder; do not use this checkpoint")
    return folder / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well and vanishes when it does not.

    An interruption leaves nothing behind; a failure to write becomes an `OutputError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, SfumatoError):
            raise
        raise OutputError(_cannot_write(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {path}; free some and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {path}; choose another place"
    return f"{path} cannot be written ({error.strerror or error}); choose another place"
