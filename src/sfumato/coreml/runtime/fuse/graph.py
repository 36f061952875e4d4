"""A function as a graph: who produces and who reads each value, with replaceable operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from sfumato.coreml.program import Function, Operation, TensorType, Value

__all__ = ["Entry", "Graph"]

Entry = str | Value


class Graph:
    """The operations of a function, some of which are being replaced by equivalent ones."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._operations: list[list[Operation]] = [[operation] for operation in function.operations]
        self._makers: dict[str, Operation] = {}
        self._readers = Counter(function.outputs)
        self.types: dict[str, TensorType] = {each.name: each.type for each in function.inputs}
        for operation in function.operations:
            self._enter(operation)

    def each(self, *types: str) -> Iterator[tuple[int, Operation]]:
        """Yield operations of these types with their indices, in their current state."""
        for place, group in enumerate(self._operations):
            if group[-1].type in types:
                yield place, group[-1]

    def maker(self, entry: Entry, *types: str) -> Operation | None:
        """Return the operation that computes a value if it has one of these types, else None."""
        made = self._makers.get(entry) if isinstance(entry, str) else None
        return made if made is not None and made.type in types else None

    def inner(self, entry: Entry, *types: str) -> Operation | None:
        """Like `maker`, but only if the value has a single reader."""
        return self.maker(entry, *types) if isinstance(entry, str) and self._readers[entry] == 1 else None

    def readers(self, entry: Entry) -> int:
        """Return how often a value is read, or returned by the function."""
        return self._readers[entry] if isinstance(entry, str) else 0

    def type(self, entry: Entry) -> TensorType:
        """Return the type of a value."""
        return entry.type if isinstance(entry, Value) else self.types[entry]

    def shape(self, entry: Entry) -> tuple[int, ...] | None:
        """Return the shape of a value if it is fully known, else None."""
        sides = self.type(entry).shape
        known = tuple(side for side in sides if side is not None)
        return known if len(known) == len(sides) else None

    def constant(self, entry: Entry) -> Value | None:
        """Return a value's constant if it is one, else None."""
        if isinstance(entry, Value):
            return entry
        made = self.maker(entry, "const")
        return None if made is None else made.attributes.get("val")

    def numbers(self, operation: Operation, name: str) -> np.ndarray | None:
        """Return the elements of a parameter, flat, if it is a constant and not text, else None."""
        entries = operation.inputs.get(name, ())
        value = self.constant(entries[0]) if entries else None
        data = None if value is None else value.read()
        return np.ravel(data) if isinstance(data, np.ndarray) or np.isscalar(data) else None

    def text(self, operation: Operation, name: str) -> str | None:
        """Return the text of a parameter if it is constant, else None."""
        entries = operation.inputs.get(name, ())
        value = self.constant(entries[0]) if entries else None
        data = None if value is None or value.stored else value.read()
        return data if isinstance(data, str) else None

    def scalar(self, entry: Entry) -> float | None:
        """Return the number that a value is if it is a constant with one element, else None."""
        value = self.constant(entry)
        if value is None or value.stored or self.shape(value) is None or np.prod(self.shape(value) or (1,)) != 1:
            return None
        data = value.read()
        return None if isinstance(data, (str, tuple)) else float(np.ravel(data)[0])

    def replace(self, place: int, operations: Sequence[Operation]) -> None:
        """Replace the operation at an index by others, the last of which has its outputs."""
        old = self._operations[place]
        for operation in old:
            self._readers.subtract(operation.names)
        self._operations[place] = list(operations)
        for operation in operations:
            self._enter(operation)

    def function(self) -> Function:
        """Return the current function; operations that are no longer used remain in it."""
        operations = tuple(operation for group in self._operations for operation in group)
        return Function(self._function.inputs, self._function.outputs, operations, self._function.opset)

    def _enter(self, operation: Operation) -> None:
        self._readers.update(operation.names)
        for output in operation.outputs:
            self._makers[output.name] = operation
            self.types[output.name] = output.type
