"""Names from the ecosystem that are missing here or mean something else: one table, read from `ecosystem.toml`.

No torch here, and the table is read only when a name is asked for that does not exist.
"""

from __future__ import annotations

import sys
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from sfumato.errors import NotHere

__all__ = ["Entry", "absent", "answer", "found", "meaning", "table"]


class Entry(NamedTuple):
    """What a name is in the ecosystem, and what is so here."""

    what: str
    here: str


@cache
def table() -> dict[str, dict[str, Entry]]:
    """The whole table, by where a name stands: "package", "pipeline", "part" (of a pipeline), "utils", "meaning"."""
    text = files("sfumato").joinpath("ecosystem.toml").read_text(encoding="utf-8")
    return {
        where: {name: Entry(*entry) for name, entry in names.items()} for where, names in tomllib.loads(text).items()
    }


def found(where: str, name: str) -> Entry | None:
    """The entry of a name, or of the first pattern that fits it, such as "Flux*"."""
    entries = table()[where]
    if name in entries:
        return entries[name]
    return next((entry for pattern, entry in entries.items() if fnmatchcase(name, pattern)), None)


def answer(where: str, name: str, owner: str) -> AttributeError:
    """The error for a name that `owner` does not have: a sentence where the ecosystem has it, else Python's own."""
    entry = None if name.startswith("__") else found(where, name)
    if entry is None:
        return AttributeError(f"{owner!r} object has no attribute {name!r}")
    return NotHere(f"{name} ({entry.what}) is not in Sfumato; {entry.here}", name=name)


def absent(where: str, name: str, module: str) -> Exception:
    """The error for a module's `__getattr__` to raise, so that `from module import name` says the sentence, too.

    Such an import drops what an AttributeError says, and an ImportError is no answer for `hasattr`.
    """
    error = answer(where, name, module)
    imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    return ImportError(str(error), name=module) if imported and isinstance(error, NotHere) else error


def meaning(name: str) -> str:
    """What a name of the ecosystem that is here means here, for the log."""
    return f"{name}: {table()['meaning'][name].here}"
