"""Whether two ML Programs are the same, to the bit of every constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfumato.coreml.program import Value

__all__ = ["plain"]


def plain(thing: Any) -> Any:
    """A model, or a part of one, as what `==` compares: constants are their type and bytes, wherever they are kept."""
    if isinstance(thing, Value):
        data = thing.read()
        if isinstance(data, np.ndarray):
            return str(thing.type), str(data.dtype), data.shape, data.tobytes()
        return str(thing.type), data
    if dataclasses.is_dataclass(thing):
        return {field.name: plain(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    if isinstance(thing, Mapping):
        return {key: plain(value) for key, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(plain(one) for one in thing)
    return thing
