"""Hidden names for unfinished files, and cleaning up after processes that were killed.

A name is `.NAME.PID.RANDOM.part` for a file, `….new` for a folder. The writer also holds a lock on it, which the system
releases when the process dies, so that files still being written by another container, which has its own process ids,
are not removed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["beside", "sweep"]

# How many bytes of the name to repeat; file systems allow 255 in total, encrypted ones 143.
KEPT_BYTES = 100


@contextmanager
def beside(path: Path, *, folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new empty file (or folder) under a hidden name next to `path`, which is deleted at the end.

    It may be moved away before that. What dead processes left behind for `path` is removed first. mode: permissions,
    before the umask; files are never executable.
    """
    sweep(path)
    hidden = path.with_name(f"{_start(path)}{os.getpid()}.{secrets.token_hex(4)}.{'new' if folder else 'part'}")
    if folder:
        hidden.mkdir(mode, parents=True)
    else:
        os.close(os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o666))
    try:
        with _held(hidden):
            yield hidden
    finally:
        _remove(hidden)


def sweep(path: Path) -> None:
    """Remove what dead processes left behind while writing `path`; a folder that was being replaced is restored."""
    start = _start(path)
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = re.fullmatch(re.escape(start) + r"(\d{1,9})\.(\w+\.)?(part|new|old)", entry.name)
            if found is None or _runs(int(found[1])):
                continue
            left = path.with_name(entry.name)
            with _held(left) as free:
                if free and found[3] == "old" and not os.path.lexists(path):
                    left.rename(path)
                elif free:
                    _remove(left)


def _runs(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process)


def _start(path: Path) -> str:
    return f".{path.name.encode(errors='surrogateescape')[:KEPT_BYTES].decode(errors='ignore')}."


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Try to lock a file or folder; yield whether that succeeded. Always True on systems without locks."""
    try:
        import fcntl
    except ImportError:  # Windows does not allow removing an open file
        yield True
        return
    number = None
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        if number is not None:
            os.close(number)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
