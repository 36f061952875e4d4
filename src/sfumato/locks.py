"""File locks that the system releases when their owner dies."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["is_locked", "locked"]

log = logging.getLogger("sfumato")

BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(path: Path, *, alone: bool = True, busy: str, unknown: str) -> Iterator[None]:
    """Lock a file within the block, exclusively if `alone`, otherwise shared.

    Raises `UsageError` with the message `busy` if another lock prevents it. On a file system without locks, logs the
    message `unknown` and locks nothing.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(number, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in BUSY:
            os.close(number)
            raise UsageError(busy) from error
        log.warning("%s", unknown)
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(number)


def is_locked(path: Path) -> bool:
    """Return whether a file is locked, as far as the file system can tell."""
    try:
        import fcntl

        number = os.open(path, os.O_RDWR)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in BUSY
    finally:
        os.close(number)
    return False
