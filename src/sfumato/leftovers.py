"""Hidden names for unfinished files, and cleaning up after processes that were killed.

A name is `.NAME.PID.RANDOM.part` for a file, `….new` for a folder. Whoever writes also holds a lock on it, which the
system lets go when the process dies, so that nobody takes away what another container, with numbers of its own, is
still writing.
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

# Bytes of the name that are repeated; file systems allow 255 in all, encrypted ones 143.
KEPT_BYTES = 100


@contextmanager
def beside(path: Path, *, folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """A new empty file (or folder) under a hidden name beside `path`, which is gone when the block ends.

    The block may move it away before. What dead processes left of writing `path` is removed first. mode: permissions,
    less the umask's; a file is never executable.
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
    """Remove what dead processes left of writing `path`; a folder that was being replaced is put back."""
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
    """Hold the lock on a file or folder, if nobody else does; where there are no locks, nobody does."""
    try:
        import fcntl
    except ImportError:  # Windows, which lets nobody remove a file that is open
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
