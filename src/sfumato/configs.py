"""Configurations: frozen dataclasses whose field names are the keys of the checkpoint's JSON files.

`parse` turns a JSON mapping into one of them. Keys a class does not know are kept in `extra` (so that a round trip
loses nothing) and handed back to the caller to be reported once; a *value* that is not supported is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Config", "one_of", "parse"]

C = TypeVar("C", bound="Config")

# Bookkeeping keys that the ecosystem writes beside the real ones; never reported as unknown.
BOOKKEEPING_PREFIX = "_"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A read-only record that is also readable like the mapping it came from (`config["key"]`, `config.get("key")`)."""

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Every key and value, unknown ones included, as they would stand in the JSON file (tuples become lists)."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in (own | dict(self.extra)).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def keys(self) -> list[str]:
        """The names of all keys, unknown ones included."""
        return list(self.to_dict())

    def items(self) -> list[tuple[str, Any]]:
        """All keys with their values."""
        return list(self.to_dict().items())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none."""
        return self.to_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.to_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not fields: a foreign key that travelled along.
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no key {name!r}")


def parse(cls: type[C], mapping: Mapping[str, Any]) -> tuple[C, list[str]]:
    """Read a JSON mapping into a config class.

    Returns the config and the names of the keys it does not know. Lists become tuples, so that configs hash and compare.
    Raises `ConfigError` from the class's own checks.
    """
    names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
    frozen = {key: _freeze(value) for key, value in mapping.items()}
    known = {key: value for key, value in frozen.items() if key in names}
    unknown = {key: value for key, value in frozen.items() if key not in names}
    config = cls(**known, extra=unknown)
    return config, [key for key in unknown if not key.startswith(BOOKKEEPING_PREFIX)]


def one_of(owner: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless the value is among the allowed ones."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{owner}: {key} = {value!r} is not supported; supported values are {choices}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
