"""Log levels, under the ecosystem's names. All messages go to Python's logger "sfumato"."""

from __future__ import annotations

import logging
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING, Logger
from typing import Any

from sfumato.ecosystem import absent

__all__ = [
    "CRITICAL", "DEBUG", "ERROR", "INFO", "WARNING", "disable_default_handler", "enable_default_handler", "get_logger",
    "get_verbosity", "set_verbosity", "set_verbosity_debug", "set_verbosity_error", "set_verbosity_info",
    "set_verbosity_warning",
]  # fmt: skip

_root = logging.getLogger("sfumato")
_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))


def get_logger(name: str | None = None) -> Logger:
    """Return a logger by name (default: Sfumato's own)."""
    return _root if name is None else logging.getLogger(name)


def get_verbosity() -> int:
    """Return the lowest level of messages that are shown."""
    return _root.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Show messages of this level of Python's `logging` and above, on standard error unless a handler already shows
    them.
    """
    _root.setLevel(verbosity)
    if not _root.hasHandlers():
        _root.addHandler(_handler)


def set_verbosity_debug() -> None:
    """Show everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Also show what names of the ecosystem do in Sfumato."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors (the default)."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(ERROR)


def enable_default_handler() -> None:
    """Show messages on standard error."""
    _root.addHandler(_handler)


def disable_default_handler() -> None:
    """Do not show messages on standard error; other handlers still receive them."""
    _root.removeHandler(_handler)


def __getattr__(name: str) -> Any:
    raise absent("logging", name, __name__)
