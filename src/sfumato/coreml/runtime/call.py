"""A planned operation: its parameters resolved and bound to one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sfumato.coreml.program import Operation, TensorType, Value

__all__ = ["Binder", "Bound", "Call", "Late", "NumbersOf"]

_REQUIRED: Any = object()

# The numbers or text of a name, if they are known before the program runs.
NumbersOf = Callable[[str], "np.ndarray | str | tuple[str, ...] | None"]


class Late(Exception):
    """A parameter is known only while the program runs, so the operation must be bound then."""


class Bound(NamedTuple):
    """What an operation does: `run` is called with the values of the entries `reads`, in order.

    moves: the result has the very numbers of its inputs, so that rounding them again would be in vain; it may share
        their memory.
    ready: by place in `reads`, what to make of a constant once where it is kept; `run` takes that in its stead.
    """

    run: Callable[..., Any]
    reads: tuple[str | Value, ...]
    moves: bool = False
    ready: Mapping[int, Callable[[Any], Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Call:
    """One operation with what is known of its inputs before it runs."""

    operation: Operation
    types: Mapping[str, TensorType]
    numbers_of: NumbersOf

    def entries(self, name: str) -> tuple[str | Value, ...]:
        """What the operation is given as `name`: names of values, or constants; none if it is not given."""
        found = self.operation.inputs.get(name)
        if found is None:
            attribute = self.operation.attributes.get(name)
            found = () if attribute is None else (attribute,)
        return found

    def given(self, *names: str) -> tuple[str, ...]:
        """Those of the optional inputs that the operation is given."""
        return tuple(name for name in names if self.entries(name))

    def type(self, name: str = "x") -> TensorType:
        """The type of an input."""
        entry = self._entry(name)
        return entry.type if isinstance(entry, Value) else self.types[entry]

    def rank(self, name: str = "x") -> int:
        """The number of sides of an input."""
        return len(self.type(name).shape)

    @property
    def output(self) -> TensorType:
        """The type of the first output."""
        return self.operation.outputs[0].type

    def bind(self, run: Callable[..., Any], *names: str, moves: bool = False) -> Bound:
        """Bind a function that takes the values of these inputs, the entries of a variadic one in a row."""
        return Bound(run, tuple(entry for name in names for entry in self.entries(name)), moves)

    def known(self, name: str, default: Any = _REQUIRED) -> Any:
        """The numbers (an array) or the text of a parameter. Raises `Late` if only the running program knows it."""
        if not self.entries(name):
            if default is _REQUIRED:
                raise KeyError(name)
            return default
        return self._read(name, self._entry(name))

    def ints(self, name: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A vector of whole numbers."""
        found = self.known(name, default)
        return found if found is default else tuple(int(each) for each in np.ravel(found))

    def flags(self, name: str, count: int) -> tuple[bool, ...]:
        """A vector of truth values, all false if it is not given."""
        found = self.known(name, None)
        return (False,) * count if found is None else tuple(bool(each) for each in np.ravel(found))

    def each(self, name: str) -> list[int]:
        """The whole numbers of a variadic input of scalars."""
        return [int(np.ravel(self._read(name, entry))[0]) for entry in self.entries(name)]

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """One whole number."""
        return int(np.ravel(self.known(name, default))[0])

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """One number."""
        return float(np.ravel(self.known(name, default))[0])

    def flag(self, name: str, default: bool = False) -> bool:
        """One truth value."""
        return bool(np.ravel(self.known(name, default))[0])

    def text(self, name: str, default: str) -> str:
        """A word."""
        return str(self.known(name, default))

    def _read(self, name: str, entry: str | Value) -> np.ndarray | str | tuple[str, ...]:
        found = entry.read() if isinstance(entry, Value) else self.numbers_of(entry)
        if found is None:
            raise Late(name)
        return found

    def _entry(self, name: str) -> str | Value:
        entries = self.entries(name)
        if not entries:
            raise KeyError(name)
        return entries[0]


Binder = Callable[[Call], Bound]
