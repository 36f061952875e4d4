"""Validates JSON values against the fields of a facts dataclass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sfumato.errors import ConfigError, suggest
from sfumato.values import Within, check_value

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_fields", "check_speeds"]

_Text = Annotated[str, Within(1, 1000), "text"]
_Bytes = Annotated[int, Within(1, 2**50), "a number of bytes from 1 to 2**50"]
_Free = Annotated[int, Within(0, 2**50), "a number of bytes from 0 to 2**50"]
_Version = Annotated[int, Within(0, 99)]
_RULES: dict[str, Any] = {
    "name": _Text,
    "system": Literal["linux", "macos", "windows"],
    "system_version": _Text,
    "architecture": _Text,
    "processor": _Text,
    "accelerator": Literal["cpu", "cuda", "mps"],
    "accelerator_name": _Text,
    "compute_capability": tuple[_Version, _Version],
    "memory_total": _Bytes,
    "memory_free": _Free,
    "address_limited": bool,
    "accelerator_memory_total": _Bytes,
    "accelerator_memory_free": _Free,
    "unified_memory": bool,
    "cores": Annotated[int, Within(1, 2**16)],
    "load": Annotated[float, Within(0, 2**16)],
    "instructions": tuple[_Text, ...],
    "cache_l2": _Bytes,
    "cache_l3": _Bytes,
    "python": _Text,
    "libraries": dict[_Text, _Text],
    "compiler": _Text,
    "onednn": bool,
    "system_build": _Text,
    "canaries": dict[_Text, _Text],
    "speeds": dict[_Text, Annotated[float, Within(1, 1e18), "operations a second"]],
}


def check_fields(cls: Any, values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError`, naming `where` and the key, if one is missing, unknown or invalid."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: there is no fact {key!r}{suggest(key, fields)}; use one of {', '.join(fields)}"
            )
        if not (value is None and fields[key].default is None):
            check_value(where, key, value, _RULES[key])
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and key not in values:
            raise ConfigError(f"{where}: {key} is missing")


def check_speeds(values: Any, where: str) -> None:
    """Raise `ConfigError` unless these are measured speeds by name."""
    check_value(where, "speeds", values, _RULES["speeds"])
