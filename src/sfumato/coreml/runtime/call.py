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

# The array or text of a value, by name, or None if it is not known before the program runs.
NumbersOf = Callable[[str], "np.ndarray | str | tuple[str, ...] | None"]


class Late(Exception):
    """A parameter is known only while the program runs, so the operation must be bound then."""


class Bound(NamedTuple):
    """An operation ready to run: `run` is called with the values of the entries `reads`, in order.

    moves: the result consists of elements of the inputs, so it need not be rounded again; it may share their memory.
    ready: by index in `reads`, a function that prepares a constant once if it is kept; `run` gets its result instead.
    """

    run: Callable[..., Any]
    reads: tuple[str | Value, ...]
    moves: bool = False
    ready: Mapping[int, Callable[[Any], Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Call:
    """One operation, with what is known about its inputs before it runs."""

    operation: Operation
    types: Mapping[str, TensorType]
    numbers_of: NumbersOf

    def entries(self, name: str) -> tuple[str | Value, ...]:
        """Return the entries of an input: names of values, or constants; empty if the input is not given."""
        found = self.operation.inputs.get(name)
        if found is None:
            attribute = self.operation.attributes.get(name)
            found = () if attribute is None else (attribute,)
        return found

    def given(self, *names: str) -> tuple[str, ...]:
        """Return those of the optional inputs that are given."""
        return tuple(name for name in names if self.entries(name))

    def type(self, name: str = "x") -> TensorType:
        """Return the type of an input."""
        entry = self._entry(name)
        return entry.type if isinstance(entry, Value) else self.types[entry]

    def rank(self, name: str = "x") -> int:
        """Return the rank of an input."""
        return len(self.type(name).shape)

    @property
    def output(self) -> TensorType:
        """The type of the first output."""
        return self.operation.outputs[0].type

    def bind(self, run: Callable[..., Any], *names: str, moves: bool = False) -> Bound:
        """Bind a function that takes the values of these inputs; variadic inputs are unpacked."""
        return Bound(run, tuple(entry for name in names for entry in self.entries(name)), moves)

    def known(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the array or text of a parameter. Raises `Late` if only known at run time, `KeyError` if not given."""
        if not self.entries(name):
            if default is _REQUIRED:
                raise KeyError(name)
            return default
        return self._read(name, self._entry(name))

    def ints(self, name: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Return a vector of integers."""
        found = self.known(name, default)
        return found if found is default else tuple(int(each) for each in np.ravel(found))

    def flags(self, name: str, count: int) -> tuple[bool, ...]:
        """Return a vector of booleans, all false if it is not given."""
        found = self.known(name, None)
        return (False,) * count if found is None else tuple(bool(each) for each in np.ravel(found))

    def each(self, name: str) -> list[int]:
        """Return the integers of a variadic input of scalars."""
        return [int(np.ravel(self._read(name, entry))[0]) for entry in self.entries(name)]

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """Return one integer."""
        return int(np.ravel(self.known(name, default))[0])

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Return one number."""
        return float(np.ravel(self.known(name, default))[0])

    def flag(self, name: str, default: bool = False) -> bool:
        """Return one boolean."""
        return bool(np.ravel(self.known(name, default))[0])

    def text(self, name: str, default: str) -> str:
        """Return a string."""
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
