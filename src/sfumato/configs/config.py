"""Configurations: frozen dataclasses whose field names are the keys of the checkpoint's JSON files.

`parse` turns a JSON mapping into one of them and holds every value to its field's annotation and bounds (values.py).
Keys a class does not know are kept in `extra` (so that a round trip loses nothing) and handed back to the caller to be
reported once; a *value* that is not supported is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from sfumato.errors import ConfigError, UsageError
from sfumato.values import Within, check_value, kinds_of, shown

__all__ = ["Config", "one_of", "parse"]

C = TypeVar("C", bound="Config")

# Bookkeeping keys that the ecosystem writes beside the real ones; never reported as unknown.
BOOKKEEPING_PREFIX = "_"
# What numbers and lists of a config may be where its class says nothing narrower. No network of this family is larger,
# and a config beyond it would fill the memory with layers before a single weight is looked at.
BOUNDS: Mapping[Any, Within] = {int: Within(1, 2**20), float: Within(-1e9, 1e9), tuple: Within(1, 1024)}


@dataclass(frozen=True, kw_only=True)
class Config(dict[str, Any]):
    """A read-only record that is also the dict it came from, unknown keys included (`config["key"]`, `**config`).

    As attributes lists are tuples; as entries they are the lists that stand in the JSON file.
    """

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    where: ClassVar[str] = "config.json"  # what errors call the file, unless `parse` is told its path
    bounds: ClassVar[Mapping[str, Within]] = {}  # of the numbers in a field, where `BOUNDS` does not fit
    without_effect: ClassVar[frozenset[str]] = frozenset()  # keys that are known to say nothing about the result
    renamed: ClassVar[Mapping[str, str]] = {}  # keys of earlier years, and what they are called now
    defaulted: ClassVar[frozenset[str]] = frozenset()  # keys of which null, as a sibling saved it, means the default

    def __post_init__(self) -> None:
        self._check()
        super().update(self.to_dict())

    def _check(self) -> None:
        """Raise `ConfigError` for values that do not go together."""

    def to_dict(self) -> dict[str, Any]:
        """Every key and value, unknown ones included, as they would stand in the JSON file (tuples become lists)."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {key: _thaw(value) for key, value in (own | dict(self.extra)).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def _refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise UsageError("configs are read-only; create another one, for example with from_config(config, key=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}), ()

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not fields: a foreign key that travelled along.
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no key {name!r}")


def parse(cls: type[C], mapping: Mapping[str, Any], where: object = None) -> tuple[C, list[str]]:
    """Read a JSON mapping into a config class; `where` is the file it stands in.

    Returns the config and the names of the keys it does not know. Lists become tuples, so that configs hash and
    compare. Raises `ConfigError`, naming file and key, for a value that is not of its field's type, is out of bounds,
    or is refused by the class's own checks.
    """
    if not hasattr(mapping, "items"):
        raise ConfigError(f"{where or cls.__name__}: a config must be a dict of settings, not {shown(mapping)}")
    kinds = {key: kind for key, kind in kinds_of(cls).items() if key != "extra"}
    given = {key: value for key, value in mapping.items() if value is not None or key not in cls.defaulted}
    frozen = {cls.renamed.get(key, key): _freeze(value) for key, value in given.items()}
    # Null where a setting is on or off means off, as it does to the ecosystem.
    known = {
        key: False if value is None and kinds[key] is bool else value for key, value in frozen.items() if key in kinds
    }
    unknown = {key: value for key, value in frozen.items() if key not in kinds}
    try:
        for key, value in known.items():
            own = cls.bounds.get(key)
            bounds = BOUNDS if own is None else {**BOUNDS, int: own, float: own}
            check_value(cls.where, key, value, kinds[key], bounds=bounds)
        config = cls(**known, extra=unknown)
    except ConfigError as error:
        if where is None:
            raise
        raise ConfigError(f"{where}{str(error).removeprefix(cls.where)}") from error
    return config, [key for key in unknown if not key.startswith(BOOKKEEPING_PREFIX) and key not in cls.without_effect]


def one_of(owner: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless the value is among the allowed ones."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{owner}: {key} = {shown(value)} is not supported; supported values are {choices}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value
