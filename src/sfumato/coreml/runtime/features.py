"""Features: validates a caller's inputs and converts values to and from the interface's types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from sfumato.coreml.program import ARRAY_DTYPES, COLORS, Feature, Flexibility, Interface
from sfumato.coreml.runtime.kinds import HELD
from sfumato.errors import UsageError, suggest

__all__ = ["array_of", "check_names", "check_tensor", "default_tensor", "tensor_from"]

_WORDS = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


def check_names(interface: Interface, given: Mapping[str, Any]) -> None:
    """Raise `UsageError` if an input without a default is missing, or one is given that the model does not have."""
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
        if feature.name not in given and feature.default is None:
            raise UsageError(f"the input {feature.name!r} is missing; it must be {_described(feature)}")


def default_tensor(feature: Feature) -> torch.Tensor:
    """Return the tensor for an input that is not given, filled with its default value."""
    flexibility = feature.flexibility
    shape = [side or 0 for side in (feature.type.shape if flexibility is None else flexibility.default)]
    return torch.full(shape, feature.default or 0, dtype=HELD[feature.type.dtype])


def tensor_from(feature: Feature, value: Any) -> torch.Tensor:
    """Convert an array to an input tensor of the model, cast to the feature's dtype.

    An image can have the model's own shape and channel order, (1, C, H, W), or be a Pillow image or an array (H, W, 3)
    in RGB or (H, W) in grayscale, with values from 0 to 255.

    Raises `UsageError` if it is not numeric, has the wrong shape, or has fractions where the model takes integers.
    """
    try:
        array = np.asarray(value) if feature.image is None else _picture(feature.image, value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the input {feature.name!r} must be {_described(feature)}; it is not an array: {error}"
        ) from error
    if array.dtype.kind not in "fiub":
        raise UsageError(f"the input {feature.name!r} must be {_described(feature)}, not an array of {array.dtype}")
    _check_shape(feature, array.shape)
    wanted = ARRAY_DTYPES[feature.type.dtype]
    if wanted.kind in "iu" and array.dtype.kind in "fiu":
        limits = np.iinfo(wanted)
        whole = array == np.floor(array)
        if not np.all(whole & (array >= limits.min) & (array <= limits.max)):
            raise UsageError(f"the input {feature.name!r} must be {_described(feature)}; some values do not fit it")
    with np.errstate(over="ignore"):  # as in Core ML, values too large for float16 become infinite
        return torch.from_numpy(np.array(array, dtype=wanted)).to(HELD[feature.type.dtype])


def check_tensor(feature: Feature, value: torch.Tensor) -> None:
    """Raise `UsageError` if a tensor does not have the shape of its feature."""
    _check_shape(feature, tuple(value.shape))


def array_of(feature: Feature, value: torch.Tensor) -> np.ndarray:
    """Convert an output to an array of its feature's dtype."""
    with np.errstate(over="ignore"):
        return value.numpy().astype(ARRAY_DTYPES[feature.type.dtype])


def _picture(color: str, value: Any) -> np.ndarray:
    """Convert an image to the model's channel order, (1, C, H, W); an array with four axes is returned unchanged."""
    array = np.asarray(value.convert("RGB" if COLORS[color] == 3 else "L") if hasattr(value, "convert") else value)
    if array.ndim == 2:
        return array[None, None]
    if array.ndim != 3 or array.shape[2] != 3:
        return array
    return (array[..., ::-1] if color == "BGR" else array).transpose(2, 0, 1)[None]


def _check_shape(feature: Feature, shape: tuple[int, ...]) -> None:
    wanted = feature.type.shape
    fits = len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))
    if not fits or not _allowed(feature.flexibility, shape):
        raise UsageError(f"the input {feature.name!r} must be {_described(feature)}; its shape is {shape}")


def _allowed(flexibility: Flexibility | None, shape: tuple[int, ...]) -> bool:
    """Return whether a shape is listed, or within the ranges, which Core ML enforces."""
    if flexibility is None or not (flexibility.shapes or flexibility.ranges):
        return True
    if flexibility.shapes:
        return shape in (flexibility.default, *flexibility.shapes)
    return all(
        least <= side and (most is None or side <= most)
        for side, (least, most) in zip(shape, flexibility.ranges, strict=True)
    )


def _described(feature: Feature) -> str:
    kind, flexibility = feature.type.dtype, feature.flexibility
    shapes = [_listing("any" if side is None else str(side) for side in feature.type.shape)]
    if flexibility is not None and flexibility.shapes:
        shapes = [_listing(map(str, shape)) for shape in dict.fromkeys((flexibility.default, *flexibility.shapes))]
    elif flexibility is not None and flexibility.ranges:
        shapes = [_listing(_range(*limits) for limits in flexibility.ranges)]
    return f"an array of {_WORDS.get(kind, kind)} in the shape {' or '.join(shapes)}"


def _listing(sides: Iterable[str]) -> str:
    words = list(sides)
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def _range(least: int, most: int | None) -> str:
    return str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"


def _listed(interface: Interface) -> str:
    return ", ".join(repr(feature.name) for feature in interface.inputs) or "none"
