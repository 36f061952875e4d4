"""Atomic folder writes: a folder appears when it is complete, and replaces the old one only then."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.files import naming, output_folder
from sfumato.leftovers import beside

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from os import PathLike

__all__ = ["replacing_folder", "saving_into"]


@contextmanager
def saving_into(
    path: str | PathLike[str], *, last: str, own: Collection[str] = (), stale: Callable[[str], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield a hidden folder to save into. On success, all of its contents appear in `path` at once.

    Other files in `path` are kept. last: the file without which nothing in the folder is read. own: the subfolders that
    are saved. stale: whether to delete a file of an earlier save, by its name, if no new one replaces it. A process
    that is killed leaves the earlier save intact. If `path` cannot be exchanged as a whole (it has other subfolders,
    contains the current folder, or its parent is not writable), there is a moment in which `last` is missing, so that
    nothing is read. Raises `OutputError`.
    """
    folder = Path(os.path.realpath(output_folder(path)))
    with naming(folder):
        whole = _is_exchangeable(folder, own)
        place = folder if whole else folder / folder.name
        with beside(place, folder=True) as new:
            _as_before(folder, new)
            for entry in folder.iterdir():
                if entry.is_dir() and entry.name in own:
                    shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
                elif whole and not stale(entry.name):
                    _link(entry, new / entry.name)
            yield new
            for inner in (new, *filter(Path.is_dir, new.iterdir())):
                _settle(inner)
            if not (whole and _exchanged(new, folder)):
                _move_into(folder, new, last, stale)
            _settle(folder.parent if whole else folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` that replaces it on success and is deleted on failure.

    It is synced to disk first, and the old one stays in place until then. Raises `OutputError`.
    """
    with naming(path), beside(path, folder=True) as new:
        yield new
        for inner in sorted(new.rglob("*"), reverse=True):
            _settle(inner)
        if not (path.is_dir() and _exchanged(new, path)):
            new.rename(path)
        _settle(path.parent)


def _is_exchangeable(folder: Path, own: Collection[str]) -> bool:
    """Return whether a folder contains only a save and plain files, and can be replaced without side effects."""
    ours = all(entry.name in own for entry in folder.iterdir() if entry.is_dir())
    here = Path(os.path.realpath(os.curdir))
    return (
        ours and not here.is_relative_to(folder) and not os.path.ismount(folder) and os.access(folder.parent, os.W_OK)
    )


def _as_before(folder: Path, new: Path) -> None:
    """Copy the permissions and owner of a folder to its replacement."""
    shutil.copymode(folder, new)
    with suppress(OSError, AttributeError):  # only root may change owners, and Windows has none
        os.chown(new, folder.stat().st_uid, folder.stat().st_gid)


def _link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, which is only ever replaced, never modified; copy it if links are not supported."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, RuntimeError):  # NotImplementedError: links themselves cannot be linked
        shutil.copy2(source, target, follow_symlinks=False)


def _move_into(folder: Path, new: Path, last: str, stale: Callable[[str], bool]) -> None:
    """Move the contents one by one, while `last` is missing."""
    with suppress(FileNotFoundError):
        os.unlink(folder / last)
    for entry in folder.iterdir():
        if stale(entry.name):
            entry.unlink()
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name == last):
        if not ((folder / entry.name).is_dir() and _exchanged(entry, folder / entry.name)):
            entry.replace(folder / entry.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders, in one step if possible (Linux, macOS), else in three. Return whether it succeeded."""
    import ctypes

    with suppress(AttributeError, TypeError):
        system, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
        swapped = (
            system.renamex_np(*names, 2)  # RENAME_SWAP
            if sys.platform == "darwin"
            else system.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
        )
        if swapped == 0:
            return True
    spare = one.with_suffix(".old")  # restored from this name if the process is killed here (leftovers.py)
    with suppress(OSError):
        other.rename(spare)
        try:
            one.rename(other)
        except OSError:
            spare.rename(other)
            raise
        spare.rename(one)
        return True
    return False


def _settle(folder: Path) -> None:
    """Sync a folder's entries to disk; not possible on Windows."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
