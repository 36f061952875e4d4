"""Names from diffusers and transformers that are missing here or mean something else, as a table: `ecosystem.toml`.

Does not import torch. The table is only read when a missing name is accessed.
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
    """What a name is in diffusers or transformers, and what replaces it here."""

    what: str
    here: str


@cache
def table() -> dict[str, dict[str, Entry]]:
    """Load the table, by kind of name: "package", "pipeline", "part" (of a pipeline), "utils", "meaning"."""
    text = files("sfumato").joinpath("ecosystem.toml").read_text(encoding="utf-8")
    return {
        where: {name: Entry(*entry) for name, entry in names.items()} for where, names in tomllib.loads(text).items()
    }


def found(where: str, name: str) -> Entry | None:
    """Return the entry for a name, or for the first pattern that matches, such as "Flux*"."""
    entries = table()[where]
    if name in entries:
        return entries[name]
    return next((entry for pattern, entry in entries.items() if fnmatchcase(name, pattern)), None)


def answer(where: str, name: str, owner: str) -> AttributeError:
    """Return the error for an attribute that `owner` lacks: `NotHere` if the table has it, else Python's own."""
    entry = None if name.startswith("__") else found(where, name)
    if entry is None:
        return AttributeError(f"{owner!r} object has no attribute {name!r}")
    return NotHere(f"{name} ({entry.what}) is not in Sfumato; {entry.here}", name=name)


def absent(where: str, name: str, module: str) -> Exception:
    """Return the error for a module's `__getattr__` to raise, which `from module import name` also shows.

    Such an import discards the message of an AttributeError, but `hasattr` needs one rather than an ImportError.
    """
    error = answer(where, name, module)
    imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    return ImportError(str(error), name=module) if imported and isinstance(error, NotHere) else error


def meaning(name: str) -> str:
    """Return what a name from diffusers means here, for the log."""
    return f"{name}: {table()['meaning'][name].here}"
