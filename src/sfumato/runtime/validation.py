"""Checking the values of a JSON object against the fields of a dataclass of facts."""

from __future__ import annotations

import dataclasses
from math import isfinite
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["check_fields", "check_speeds"]

MOST_BYTES, MOST_CORES, MOST_OPERATIONS = 2**50, 2**16, 1e18


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and low <= value <= high


def _list(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(each, value))


def _mapping(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(_text, value)) and all(map(each, value.values()))


def _one_of(*allowed: str) -> tuple[str, Callable[[Any], bool]]:
    return " or ".join(map(repr, allowed)), lambda value: value in allowed


_TEXT = ("a text", _text)
_BYTES = ("a number of bytes from 1 to 2**50", lambda value: _whole(value, 1, MOST_BYTES))
_FREE = ("a number of bytes from 0 to 2**50", lambda value: _whole(value, 0, MOST_BYTES))
_TRUTH = ("true or false", lambda value: isinstance(value, bool))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": _TEXT,
    "system": _one_of("linux", "macos", "windows"),
    "system_version": _TEXT,
    "architecture": _TEXT,
    "processor": _TEXT,
    "accelerator": _one_of("cpu", "cuda", "mps"),
    "accelerator_name": _TEXT,
    "compute_capability": (
        "two whole numbers such as [8, 9]",
        lambda value: _list(value, lambda number: _whole(number, 0, 99)) and len(value) == 2,
    ),
    "memory_total": _BYTES,
    "memory_free": _FREE,
    "address_limited": _TRUTH,
    "accelerator_memory_total": _BYTES,
    "accelerator_memory_free": _FREE,
    "unified_memory": _TRUTH,
    "cores": ("a whole number from 1 to 65536", lambda value: _whole(value, 1, MOST_CORES)),
    "load": ("a number from 0 to 65536", lambda value: _number(value, 0, MOST_CORES)),
    "instructions": ("a list of texts", lambda value: _list(value, _text)),
    "cache_l2": _BYTES,
    "cache_l3": _BYTES,
    "python": _TEXT,
    "libraries": ("an object of names and versions", lambda value: _mapping(value, _text)),
    "compiler": _TEXT,
    "speeds": (
        "an object of names and operations a second",
        lambda value: _mapping(value, lambda number: _number(number, 1, MOST_OPERATIONS)),
    ),
}


def check_fields(cls: Any, values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` naming `where` and the key, if one is missing, unknown, or has no sensible value."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: there is no fact {key!r}{suggest(key, fields)}; known are {', '.join(fields)}")
        wanted, check = _RULES[key]
        if not (value is None and fields[key].default is None) and not check(value):
            raise ConfigError(f"{where}: {key} must be {wanted}, not {value!r}")
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and key not in values:
            raise ConfigError(f"{where}: {key} is missing; it must be {_RULES[key][0]}")


def check_speeds(values: Any, where: str) -> None:
    """Raise `ConfigError` unless these are measured speeds by name."""
    wanted, check = _RULES["speeds"]
    if not check(values):
        raise ConfigError(f"{where}: speeds must be {wanted}")
