"""The user's cache. Everything in it can be rebuilt, so a broken cache is logged and never stops the work."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, ConfigError
from sfumato.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cache_folder", "is_private", "keep", "private_folder", "read_kept", "work_without"]

log = logging.getLogger("sfumato")

# Cached JSON files are small; a larger file is not ours.
MOST_BYTES = 2**22


def cache_folder() -> Path | None:
    """Return $SFUMATO_CACHE, else the system's cache folder for the user. Does not create it; None without a home."""
    try:
        if chosen := os.environ.get("SFUMATO_CACHE"):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "sfumato"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sfumato"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"
    except RuntimeError:
        _say_once("no cache is used, because there is no home folder; set SFUMATO_CACHE to a folder of your own")
        return None


def read_kept(name: str, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return the JSON object cached under a name such as "speeds/x.json"; empty if there is none.

    One that is damaged, or for which `check` raises `ConfigError`, is deleted with a warning.
    """
    folder = cache_folder()
    if folder is None:
        return {}
    path = folder / name
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES:
            values = read_json(path)
            check(values)
            return values
    except FileNotFoundError:
        return {}
    except (ConfigError, RecursionError):
        pass
    except OSError as error:
        if not isinstance(error, CheckpointError) or isinstance(error.__cause__, OSError):
            work_without(error)
            return {}
    with suppress(OSError):
        path.unlink()
    log.warning("%s was damaged and is recreated", path)
    return {}


def keep(name: str, values: dict[str, Any]) -> None:
    """Cache a JSON object under a name, for `read_kept`. A failure is only logged."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        _make((folder / name).parent)
        write_json(folder / name, values)
    except OSError as error:
        work_without(error)


def private_folder(name: str) -> Path | None:
    """Create a cache folder for executable files and return it; None if other users could write to or replace it."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        _make(folder / name)
        place = Path(os.path.realpath(folder / name, strict=True))
        if not (is_private(place) and is_private(place.parent)) or any(map(_open_to_all, place.parent.parents)):
            _say_once(
                f"kernels are not cached in {folder}, because other users could change them there; set SFUMATO_CACHE "
                "to a folder that only you can write"
            )
            return None
        if not os.access(place, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        work_without(error)
        return None
    return place


def is_private(path: Path) -> bool:
    """Return whether a file or folder belongs to this user or root and nobody else can write to it; False for links.

    Raises `OSError` if it cannot be inspected.
    """
    found = path.lstat()
    if not hasattr(os, "geteuid"):  # on Windows, the user's folders are private by default
        return True
    whole = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return whole and found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def work_without(error: OSError) -> None:
    """Warn once that the cache cannot be used, and why."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    reason = (
        "it is not a folder" if isinstance(cause, (FileExistsError, NotADirectoryError)) else cause.strerror or cause
    )
    _say_once(f"the cache in {cache_folder()} cannot be used ({reason}); set SFUMATO_CACHE to a folder of your own")


def _open_to_all(folder: Path) -> bool:
    """Return whether anybody may rename a folder's contents; in sticky folders like /tmp, only the owner may."""
    mode = folder.lstat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _make(folder: Path) -> None:
    """Create a folder for this user only, with its parents. Raises `OSError`."""
    for place in (*reversed(folder.parents), folder):
        place.mkdir(mode=0o700, exist_ok=True)


@cache
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)
