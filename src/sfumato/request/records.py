"""The building blocks of requests: frozen records that convert to JSON and back, with numeric ranges."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.values import Within, check_record, shown

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Layers", "Level", "Pixels", "Place", "Record", "Seed", "Share", "Weight", "check_word"]

Share = Annotated[float, Within(0, 1)]
Pixels = Annotated[int, Within(1, 2**24), "a positive number of pixels, at most 2**24"]
Seed = Annotated[int, Within(0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"]
Layers = Annotated[int, Within(0, 1000)]
Level = Annotated[int, Within(0, 999)]
Place = Annotated[int, Within(-(2**24), 2**24)]
Weight = Annotated[float, Within(-1000, 1000)]


class Record:
    """A frozen dataclass that can be converted to JSON and back. nested: its fields that contain records."""

    nested: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in _defaults(type(self)):
            if isinstance(value := getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(value))
        check_record(self, "", UsageError)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON values."""
        return {
            name: _plain(value)
            for name, default in _defaults(type(self)).items()
            if (value := getattr(self, name)) is not default and value != default
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Create a record from `to_dict`'s output. Raises `UsageError` for unknown and missing fields."""
        known = _defaults(cls)
        for name in values:
            if name not in known:
                raise UnknownArgument(f"a request has no field {name!r}{suggest(name, known)}")
        if missing := [n for n, default in known.items() if default is dataclasses.MISSING and n not in values]:
            raise UsageError(f"{cls.__name__} needs {missing[0]!r}")
        return cls(
            **values | {name: _records(kind, values[name]) for name, kind in cls.nested.items() if name in values}
        )


@cache
def _defaults(cls: Any) -> dict[str, Any]:
    """Return the default of each field of a record; `dataclasses.MISSING` where there is none."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def check_word(name: str, value: str, known: Collection[str]) -> None:
    """Raise `UsageError`, with the most similar word, unless `value` is one of `known`."""
    if value not in known:
        *most, last = known
        raise UsageError(f"{name} must be {', '.join(most)} or {last}, not {shown(value)}{suggest(value, known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return value.to_dict() if isinstance(value, Record) else value


def _records(kind: Any, value: Any) -> Any:
    """Convert JSON objects, or lists of them, to records. Other values are left for validation to reject."""
    if isinstance(value, list):
        return tuple(_records(kind, one) for one in value)
    return kind.from_dict(value) if isinstance(value, dict) else value
