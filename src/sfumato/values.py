"""One validator for all values from files and callers: a field's annotation, with bounds, is the rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from reprlib import Repr
from sys import float_info
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from sfumato.errors import ConfigError, SfumatoError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Within", "check_argument", "check_number", "check_record", "check_value", "kinds_of", "reason", "shown"]


@dataclass(frozen=True)
class Within:
    """Inclusive bounds of a number, or of the length of a text or list."""

    low: float
    high: float


# The bounds of annotations without any: 64 bits, finite numbers, and no more than a sane file contains.
_BOUNDS: Mapping[Any, Within] = {
    int: Within(-(2**63), 2**63 - 1),
    float: Within(-float_info.max, float_info.max),
    str: Within(0, 2**20),
    tuple: Within(0, 10**5),
    dict: Within(0, 10**5),
}
_WORDS: dict[Any, tuple[str, str]] = {
    Any: ("a value", "values"),
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "strings"),
}
_TYPES: dict[Any, Any] = {bool: bool, int: int, float: (int, float), str: str, tuple: (list, tuple), dict: dict}
_short = Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """Format a value for an error message, in at most one line."""
    return " ".join(_short.repr(value).split())


def reason(error: BaseException) -> str:
    """Format another library's error as part of our message, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_value(
    where: str,
    key: str,
    value: object,
    kind: Any,
    *,
    bounds: Mapping[Any, Within] | None = None,
    error: type[SfumatoError] = ConfigError,
) -> None:
    """Raise `error`, naming `where`, the key and what it must be, unless the value matches an annotation.

    kind: a type such as `float | None`, `tuple[int, ...]`, `dict[str, str]` or `Literal["a", "b"]`. In
    `Annotated[kind, Within(low, high), words]`, the bounds and the words for messages are optional. bounds: defaults by
    type, for annotations without bounds.
    """
    test = _test(kind, None if bounds is None else tuple(bounds.items()))
    if not test(value):
        bounds = _BOUNDS if bounds is None else {**_BOUNDS, **bounds}
        prefix = f"{where}: " if where else ""
        raise error(f"{prefix}{key} must be {_wanted(value, kind, bounds)}, not {shown(value)}")


def check_argument(name: str, value: object, kind: Any) -> None:
    """Raise `UsageError` unless an argument matches an annotation; see `check_value`."""
    check_value("", name, value, kind, error=UsageError)


def check_number(name: str, value: Any) -> None:
    """Raise `UsageError` unless an argument is a single number, which may be in an array or tensor."""
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # more than one element
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise UsageError(f"{name} must be one number, not {shown(value)}")


def check_record(record: Any, where: str, error: type[SfumatoError] = ConfigError) -> None:
    """Apply `check_value` to every field of a dataclass; fields at their default are skipped."""
    for name, kind, default, test in _fields(type(record)):
        value = getattr(record, name)
        if value is not default and not test(value):
            check_value(where, name, value, kind, error=error)


@cache
def _fields(cls: Any) -> list[tuple[str, Any, Any, Callable[[Any], bool]]]:
    kinds = kinds_of(cls)
    return [(one.name, kinds[one.name], one.default, _test(kinds[one.name], None)) for one in dataclasses.fields(cls)]


@cache
def kinds_of(cls: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields, including bounds."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _parts(kind: Any) -> tuple[Any, Within | None, str | None]:
    """Return a kind without its bounds, the bounds, and its description."""
    if get_origin(kind) is not Annotated:
        return kind, None, None
    plain, *notes = get_args(kind)
    bounds = next((note for note in notes if isinstance(note, Within)), None)
    return plain, bounds, next((note for note in notes if isinstance(note, str)), None)


@cache
def _test(kind: Any, bounds: tuple[tuple[Any, Within], ...] | None) -> Callable[[Any], bool]:
    """Return the function that tells whether a value matches an annotation. bounds: those that replace defaults.

    An annotation is taken apart once, not at each of a million checks.
    """
    plain, within, _ = _parts(kind)
    origin, args = get_origin(plain), get_args(plain)
    base = origin or plain
    if plain is Any:
        return lambda value: True
    if plain is NoneType:
        return lambda value: value is None
    if origin in (Union, UnionType):
        tests = [_test(one, bounds) for one in args]
        return lambda value: any(test(value) for test in tests)
    if origin is Literal:
        return lambda value: any(type(value) is type(one) and value == one for one in args)
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return lambda value: isinstance(value, base)  # which validated itself
    within = within or {**_BOUNDS, **dict(bounds or ())}.get(base)
    has_size = _sized(base, within)
    if base is dict:
        keys, values = (_test(one, bounds) for one in args)
        return lambda value: has_size(value) and all(keys(key) and values(one) for key, one in value.items())
    if base is not tuple:
        return has_size
    items = [_test(one, bounds) for one in args if one is not Ellipsis]
    if args[-1] is Ellipsis:
        return lambda value: has_size(value) and all(map(items[0], value))
    return lambda value: (
        has_size(value) and len(value) == len(items) and all(test(one) for test, one in zip(items, value, strict=True))
    )


def _sized(base: Any, within: Within | None) -> Callable[[Any], bool]:
    """Return the function that tells whether a value has a type and is within bounds itself, or by its length."""
    types, is_number = _TYPES[base], base in (bool, int, float)

    def has_size(value: Any) -> bool:
        if not isinstance(value, types) or (base is not bool and type(value) is bool):
            return False
        return within is None or within.low <= (value if is_number else len(value)) <= within.high

    return has_size


def _wanted(value: object, kind: Any, bounds: Mapping[Any, Within]) -> str:
    """Describe what a value must be. For a whole number, name only the bound it exceeds."""
    plain, within, words = _parts(kind)
    options = [one for one in get_args(plain) if one is not NoneType]
    if get_origin(plain) in (Union, UnionType) and len(options) == 1:
        return _wanted(value, options[0], bounds)
    if words is None and plain is int and isinstance(value, int) and not isinstance(value, bool):
        within = within or bounds[int]
        low, high = _number(within.low), _number(within.high)
        return f"at most {high}" if value > within.high else f"a whole number of at least {low}"
    return _described(kind, bounds)


def _described(kind: Any, bounds: Mapping[Any, Within], *, plural: bool = False) -> str:
    kind, within, words = _parts(kind)
    if words is not None:
        return words
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_described(one, bounds, plural=plural) for one in args if one is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is dict:
        return f"an object of {_described(args[1], bounds, plural=True)}"
    if origin is tuple:
        within = within or (bounds[tuple] if args[-1] is Ellipsis else Within(len(args), len(args)))
        few, many = _number(within.low), _number(within.high)
        number = few if few == many else f"{few} to {many}"
        return f"{'lists' if plural else 'a list'} of {number} {_described(args[0], bounds, plural=True)}"
    name, within = _WORDS[kind][plural], within or bounds.get(kind)
    if within is None or within == _BOUNDS.get(kind):
        return name
    limits = f"{_number(within.low)} to {_number(within.high)}"
    return f"{name} of {limits} characters" if kind is str else f"{name} from {limits}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
