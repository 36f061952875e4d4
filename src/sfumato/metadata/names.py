"""The names that other programs use, from one table, `names.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["names"]


@cache
def names() -> dict[str, Any]:
    """Return the whole table."""
    return tomllib.loads(files("sfumato.metadata").joinpath("names.toml").read_text(encoding="utf-8"))
