"""Features: checks of what a caller gives, and numbers to and from the types of an interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sfumato.coreml.program import ARRAY_DTYPES, Feature, Interface
from sfumato.coreml.runtime.kinds import HELD
from sfumato.errors import UsageError, suggest

__all__ = ["array_of", "check_names", "check_tensor", "tensor_from"]

_WORDS = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


def check_names(interface: Interface, given: Mapping[str, Any]) -> None:
    """Raise `UsageError` if an input is missing or one is given that the model does not have."""
    if not isinstance(given, Mapping):
        raise UsageError(
            f"inputs must be a dictionary of arrays by name, not a {type(given).__name__}; the model takes "
            f"{_listed(interface)}"
        )
    names = [feature.name for feature in interface.inputs]
    for name in given:
        if name not in names:
            near = suggest(str(name), names)
            raise UsageError(f"the model has no input {name!r}{near}; it takes {_listed(interface)}")
    for feature in interface.inputs:
        if feature.name not in given:
            raise UsageError(f"the input {feature.name!r} is missing; it must be {_described(feature)}")


def tensor_from(feature: Feature, value: Any) -> torch.Tensor:
    """An array as the model takes it, cast to the type of its feature.

    Raises `UsageError` if it is not numeric, has another shape, or is not whole where the model takes integers.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the input {feature.name!r} must be {_described(feature)}; it is no array: {error}"
        ) from error
    if array.dtype.kind not in "fiub":
        raise UsageError(f"the input {feature.name!r} must be {_described(feature)}, not an array of {array.dtype}")
    _check_shape(feature, array.shape)
    wanted = ARRAY_DTYPES[feature.type.dtype]
    if wanted.kind in "iu" and array.dtype.kind in "fiu":
        limits = np.iinfo(wanted)
        whole = array == np.floor(array)
        if not np.all(whole & (array >= limits.min) & (array <= limits.max)):
            raise UsageError(f"the input {feature.name!r} must be {_described(feature)}; it has other numbers")
    with np.errstate(over="ignore"):  # what is too large for float16 becomes infinite, as Core ML does it
        return torch.from_numpy(np.array(array, dtype=wanted)).to(HELD[feature.type.dtype])


def check_tensor(feature: Feature, value: torch.Tensor) -> None:
    """Raise `UsageError` if a tensor has not the shape of its feature."""
    _check_shape(feature, tuple(value.shape))


def array_of(feature: Feature, value: torch.Tensor) -> np.ndarray:
    """A result as callers see it: an array in the type of its feature."""
    with np.errstate(over="ignore"):
        return value.numpy().astype(ARRAY_DTYPES[feature.type.dtype])


def _check_shape(feature: Feature, shape: tuple[int, ...]) -> None:
    wanted = feature.type.shape
    fits = len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))
    if not fits:
        raise UsageError(f"the input {feature.name!r} must be {_described(feature)}; its shape is {shape}")


def _described(feature: Feature) -> str:
    kind = feature.type.dtype
    sides = ", ".join("any" if side is None else str(side) for side in feature.type.shape)
    return f"an array of {_WORDS.get(kind, kind)} in the shape ({sides}{',' if len(feature.type.shape) == 1 else ''})"


def _listed(interface: Interface) -> str:
    return ", ".join(repr(feature.name) for feature in interface.inputs) or "none"
