"""Configurations: frozen dataclasses whose field names are the keys of the checkpoint's JSON files.

`parse` turns a JSON mapping into a config and validates every value against its field's annotation and bounds
(values.py). Unknown keys are kept in `extra`, so that a round trip loses nothing, and returned to the caller, which
reports them once. An unsupported *value* is an error.
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

# Bookkeeping keys that diffusers and transformers add to the file; never reported as unknown.
BOOKKEEPING_PREFIX = "_"
# Default bounds for numbers and list lengths. No network of these families is larger, and a config beyond them would
# exhaust memory with layers before any weights are read.
BOUNDS: Mapping[Any, Within] = {int: Within(1, 2**20), float: Within(-1e9, 1e9), tuple: Within(1, 1024)}


@dataclass(frozen=True, kw_only=True)
class Config(dict[str, Any]):
    """A read-only config that is also a dict, including unknown keys (`config["key"]`, `**config`).

    Lists are tuples as attributes, and lists as dict entries, as in the JSON file.
    """

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    where: ClassVar[str] = "config.json"  # the file name in errors, unless `parse` is given a path
    bounds: ClassVar[Mapping[str, Within]] = {}  # bounds of fields for which `BOUNDS` does not fit
    without_effect: ClassVar[frozenset[str]] = frozenset()  # known keys that do not affect the result
    renamed: ClassVar[Mapping[str, str]] = {}  # old names of keys, and their current ones
    defaulted: ClassVar[frozenset[str]] = frozenset()  # keys whose null, as other classes save it, means default

    def __post_init__(self) -> None:
        self._check()
        super().update(self.to_dict())

    def _check(self) -> None:
        """Raise `ConfigError` for values that contradict each other."""

    def _check_divisible(self, *pairs: tuple[str, str]) -> None:
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{self.where}: {whole} = {getattr(self, whole)} is not divisible by {part} = {getattr(self, part)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return all keys and values, including unknown ones, as in the JSON file (tuples become lists)."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {key: _thaw(value) for key, value in (own | dict(self.extra)).items()}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def _refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise UsageError("configs are read-only; create another one, for example with from_config(config, key=value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}), ()

    def __getattr__(self, name: str) -> Any:
        # Only called for names that are not fields, such as unknown keys.
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no key {name!r}")


def parse(cls: type[C], mapping: Mapping[str, Any], where: object = None) -> tuple[C, list[str]]:
    """Parse a JSON mapping into a config class; `where` is the file it comes from.

    Returns the config and the names of unknown keys. Lists become tuples, so that configs can be hashed and compared.
    Raises `ConfigError`, naming file and key, for a value of the wrong type, out of bounds, or rejected by the class.
    """
    if not hasattr(mapping, "items"):
        raise ConfigError(f"{where or cls.__name__}: a config must be a dict of settings, not {shown(mapping)}")
    kinds = {key: kind for key, kind in kinds_of(cls).items() if key != "extra"}
    given = {key: value for key, value in mapping.items() if value is not None or key not in cls.defaulted}
    frozen = {cls.renamed.get(key, key): _freeze(value) for key, value in given.items()}
    # Null in place of a boolean means False, as in diffusers.
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
    """Raise `ConfigError` unless the value is allowed."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{owner}: {key} = {shown(value)} is not supported; supported values are {choices}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value
