"""Safe file access: errors name the file, and writes are atomic.

All reads go through `open_file`. It accepts only regular files, so that pipes do not block and devices are not read
endlessly, and limits their size.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, OutputError, SfumatoError, UsageError
from sfumato.leftovers import beside
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import BufferedReader
    from os import PathLike

__all__ = [
    "LAYOUT_VERSION",
    "add_file",
    "check_file",
    "check_writable",
    "expanded",
    "file_hash",
    "inside",
    "names_in",
    "naming",
    "open_file",
    "output_file",
    "output_folder",
    "parse_json",
    "read_bytes",
    "read_json",
    "replacing",
    "write_json",
]

# Folders are written in the layout of this version of diffusers, which reads the number.
LAYOUT_VERSION = "0.42.1"
# Far more than any valid file needs: for JSON, which takes up to thirty times its size in memory, and for other files
# that are read as a whole.
MOST_JSON, MOST_BYTES, MOST_DEPTH = 2**24, 2**30, 32


@contextmanager
def open_file(path: str | PathLike[str], most: int | None = MOST_BYTES) -> Iterator[BufferedReader]:
    """Open a regular file of at most `most` bytes for reading.

    Raises `CheckpointError` if it is missing, not a regular file, too large, or cannot be read.
    """
    # Without O_NONBLOCK, which regular files ignore, opening a pipe that nobody writes to would block.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {Path(path).parent} complete?") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise CheckpointError(f"{path} is not a regular file; copy or download it again")
    with os.fdopen(number, "rb") as stream:
        if most is not None and found.st_size > most:
            raise CheckpointError(f"{path} has {found.st_size} bytes, more than the allowed {most}")
        try:
            yield stream
        except OSError as error:
            if isinstance(error, SfumatoError):
                raise
            raise _unreadable(path, error) from error


def _unreadable(path: object, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be read ({reason}); copy or download it again")


def check_file(path: str | PathLike[str], most: int | None = None) -> int:
    """Return the size of a file before another library opens it. Raises what `open_file` would."""
    with open_file(path, most) as stream:
        return os.fstat(stream.fileno()).st_size


def read_bytes(path: str | PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Read a regular file. Raises `CheckpointError`, like `open_file`."""
    with open_file(path, most) as stream:
        return stream.read(os.fstat(stream.fileno()).st_size)


def file_hash(path: Path, most: int | None = MOST_BYTES) -> str:
    """Return the SHA-256 of a file. Raises `CheckpointError`, like `open_file`."""
    with open_file(path, most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` if it is missing, not JSON, not an object, or too large."""
    return parse_json(read_bytes(path, MOST_JSON), path)


def parse_json(text: bytes | str, where: object) -> dict[str, Any]:
    """Parse a JSON object from a text; `where` names its source. Raises `CheckpointError`, like `read_json`."""
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, not a {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for values in inner for one in values if isinstance(one, (dict, list))]
        if not level:
            return value
    raise CheckpointError(
        f"{where} is nested more than {MOST_DEPTH} deep, deeper than any valid file; download it again"
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object. Raises `OutputError` if it cannot be written."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def expanded(path: str | PathLike[str]) -> Path:
    """Return the path with `~` and `~name` expanded.

    Raises `UsageError` if that home folder does not exist, or if it is not a path.
    """
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("a path cannot contain a null byte")
        return Path(path).expanduser()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path!r} is not a path; give the name of a file or folder") from error
    except RuntimeError as error:
        raise UsageError(f"{path} starts with a home folder that does not exist; give the full path") from error


def output_folder(path: str | PathLike[str]) -> Path:
    """Create a folder if necessary and return its path. Raises `OutputError` if that fails."""
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(_cannot_write(folder, error)) from error
    return folder


def output_file(path: str | PathLike[str]) -> Path:
    """Expand and check a path for a new file. Raises `OutputError` if it could not be written; changes nothing."""
    file = expanded(path)
    _check_place(file)
    check_writable(file.parent, file.name)
    return file


def check_writable(folder: Path, *names: str) -> None:
    """Raise `OutputError` if files of these names could not be written to the folder, which may not exist yet.

    Changes nothing.
    """
    try:
        nearest = folder.absolute()
    except FileNotFoundError as error:
        raise OutputError("the current folder has been deleted; change to another one") from error
    missing = list(names)
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        missing.append(nearest.name)
        nearest = nearest.parent
    code = errno.ENOTDIR if not os.path.isdir(nearest) else 0 if os.access(nearest, os.W_OK | os.X_OK) else errno.EACCES
    if code:
        raise OutputError(_cannot_write(folder, OSError(code, f"{nearest} is not a folder")))
    # The whole path may be too long, or a part of it, which is only noticed once its parents exist.
    for place in (folder, *(nearest / name for name in missing)):
        try:
            os.lstat(place)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OutputError(_cannot_write(place, error)) from error


def names_in(folder: Path) -> set[str]:
    """Return the names in a folder; empty if it does not exist. Raises `CheckpointError` if it cannot be read."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def inside(folder: Path, name: object) -> Path:
    """Return a file in a folder, by a name from another file. Raises `CheckpointError` if it leads elsewhere."""
    if not isinstance(name, str) or len(name) > 255 or not name.isprintable():
        raise CheckpointError(f"{folder}: {shown(name)} is not a valid file name; do not use this checkpoint")
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if not name or windows.anchor or posix.is_absolute() or ".." in windows.parts:
        raise CheckpointError(f"{folder}: the file name {name!r} leads out of the folder; do not use this checkpoint")
    return folder / name


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary file next to `path` that replaces it on success and is deleted on failure.

    The file exists, empty, from the start, and is synced to disk before the replacement. An interruption leaves nothing
    behind; failed writes raise `OutputError`. mode: permissions, before the umask.
    """
    with _temporary(path, mode) as temporary:
        wanted = temporary.stat().st_mode
        yield temporary
        temporary.chmod(wanted)  # other libraries write files that only the owner can read
        _settle(temporary)
        temporary.replace(path)


def add_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a new file under this name or the first free one of `name-2.png`, `name-3.png`, …, and return its path.

    Never replaces a file, even if another process writes at the same time. write: a function that fills a temporary
    file. Raises `OutputError`.
    """
    _check_place(path)
    free, number = path, 1
    with _temporary(path) as temporary:
        write(temporary)
        _settle(temporary)
        while not _added(temporary, free):
            number += 1
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _settle(file: Path) -> None:
    """Sync a file to disk."""
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def _added(temporary: Path, path: Path) -> bool:
    """Give a file its name, unless that exists. Return whether it succeeded."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name, then fill it
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return True


@contextmanager
def _temporary(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary file next to `path`; errors are raised for `path`."""
    if not path.name:
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    _check_kind(path)
    with naming(path), beside(path, mode=mode) as temporary:
        yield temporary


def _check_place(path: Path) -> None:
    """Raise `OutputError` for a path that cannot be replaced: a folder, device or pipe."""
    if not path.name or os.path.isdir(path):
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    _check_kind(path)


def _check_kind(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OutputError(f"{path} is a device or a pipe; give the name of a file")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise failed writes in this context as an `OutputError` that names `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SfumatoError):
            raise
        raise OutputError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {path}; free some space and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {path}; choose another path"
    if error.errno == errno.ENAMETOOLONG:
        return f"the name of {path} is too long; choose a shorter one"
    return f"{path} cannot be written ({error.strerror or error}); choose another path"
