"""Writing whole folders: there when they are complete, and not before."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sfumato.errors import SfumatoError
from sfumato.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["replacing_folder"]


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends well and vanishes when it does not.

    What was at `path` stays until then, and is put back if the last step fails. Raises `OutputError` if anything
    cannot be written; other errors of the block are left as they are.
    """
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except SfumatoError:
        raise
    except OSError as error:
        with replacing(path):  # which says in one sentence what went wrong
            raise error
    finally:
        if os.path.exists(old) and not os.path.exists(path):  # a name too long is absent to them, and an error to Path
            with suppress(OSError):
                old.rename(path)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
