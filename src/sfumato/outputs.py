"""Outputs like those of diffusers: records that are also mappings and, by index, tuples."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Output"]


@dataclass(frozen=True, eq=False)
class Output(dict[str, Any]):
    """Base of frozen dataclasses whose fields can be read as `out.sample`, `out["sample"]` or `out[0]`.

    As in diffusers, the mapping and the tuple omit None, and iterating yields the names. Fields declared with
    `compare=False` are only attributes.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.compare and (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all values that are not None, in order."""
        return tuple(self.values())
