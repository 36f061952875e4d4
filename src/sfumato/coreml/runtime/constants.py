"""Values known before a function runs: constants, compressed weights, and anything computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from sfumato.coreml.program import TensorType, Value
from sfumato.coreml.runtime.kinds import HELD, tensor_of

__all__ = ["SMALL", "Constant", "Constants"]

_Numbers = np.ndarray | str | tuple[str, ...]

# Constants with at most this many elements are always kept as tensors, and not counted in the budget.
SMALL = 4096


@dataclass(frozen=True, slots=True)
class Constant:
    """A known value: its type, and a function that reads, decompresses or computes it on every call.

    let_go: releases the memory of the data that was read, once it is copied.
    """

    type: TensorType
    read: Callable[[], _Numbers | torch.Tensor]
    let_go: Callable[[], None] | None = None

    @classmethod
    def of(cls, value: Value) -> Constant:
        """Create a constant from a value in a program or a weight file."""
        return cls(value.type, value.read, getattr(value.data, "let_go", None))

    @property
    def count(self) -> int:
        """The number of elements, with unknown sizes counted as 1."""
        return prod(side or 1 for side in self.type.shape)

    @property
    def byte_count(self) -> int:
        """The size as a tensor, in bytes."""
        return self.count * HELD[self.type.dtype].itemsize

    def numbers(self) -> _Numbers:
        """Return the array or text."""
        found = self.read()
        return found.numpy() if isinstance(found, torch.Tensor) else found

    def tensor(self) -> torch.Tensor:
        """Return the value as a tensor, in the dtype that holds it (`HELD`)."""
        found = self.read()
        if isinstance(found, torch.Tensor):
            return found
        numbers = np.asarray(found)
        tensor = tensor_of(numbers, self.type.dtype)
        if self.let_go is not None and tensor.data_ptr() != numbers.ctypes.data:
            self.let_go()
        return tensor


@dataclass(frozen=True, slots=True)
class Constants:
    """The known values of a function, by name."""

    by_name: Mapping[str, Constant]

    def __contains__(self, entry: str | Value) -> bool:
        return isinstance(entry, Value) or entry in self.by_name

    def __getitem__(self, entry: str | Value) -> Constant:
        return Constant.of(entry) if isinstance(entry, Value) else self.by_name[entry]

    def numbers_of(self, name: str) -> _Numbers | None:
        """Return the array or text of a name, or None if it is not known before the program runs."""
        found = self.by_name.get(name)
        return None if found is None else found.numbers()
