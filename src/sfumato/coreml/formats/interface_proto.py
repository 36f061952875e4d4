"""Interfaces and metadata as messages: the `ModelDescription` of packages and of compiled models alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sfumato.coreml.program import MAIN, Feature, Flexibility, Interface, Model, TensorType
from sfumato.errors import ConfigError, UsageError

__all__ = ["description_fields", "fill_description", "model_names"]

# ArrayFeatureType.ArrayDataType.
_ARRAY_TYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131080: "int8", 131104: "int32"}
_ARRAY_NUMBERS = {dtype: number for number, dtype in _ARRAY_TYPES.items()}
_KINDS = {
    "imageType": "an image",
    "dictionaryType": "a dictionary",
    "sequenceType": "a sequence",
    "stateType": "a state",
    "stringType": "a text",
    "int64Type": "a single number",
    "doubleType": "a single number",
}


def description_fields(description: Any, where: str) -> dict[str, Any]:
    """The fields of a `Model` that a `ModelDescription` tells. `where` begins the sentences of errors.

    Raises `ConfigError` for features that are not arrays, and for state.
    """
    interfaces = {one.name: _interface(one, where) for one in description.functions}
    default = description.defaultFunctionName or MAIN
    metadata = description.metadata
    return {
        "interface": interfaces[default] if default in interfaces else _interface(description, where),
        "interfaces": interfaces,
        "default_function": default,
        "metadata": {one.key: one.value for one in metadata.userDefined},
        "author": metadata.author,
        "license": metadata.license,
        "version": metadata.versionString,
        "description": metadata.shortDescription,
    }


def model_names(count: int) -> list[str]:
    """What the models of a pipeline are called where it does not say."""
    return [f"model{index}" for index in range(count)]


def _interface(description: Any, where: str) -> Interface:
    if description.state:
        raise ConfigError(
            f"{where} keeps the state {description.state[0].name!r} between calls, which is not supported; "
            "convert it without state"
        )
    inputs = tuple(_feature(one, f"{where}: the input") for one in description.input)
    return Interface(inputs, tuple(_feature(one, f"{where}: the output") for one in description.output))


def _feature(feature: Any, where: str) -> Feature:
    where = f"{where} {feature.name!r}"
    kind = feature.type.WhichOneof("kind")
    if kind != "multiArrayType":
        what = _KINDS.get(str(kind), "of no type")
        raise ConfigError(f"{where} is {what}, but only arrays are supported; convert it as an array")
    array = feature.type.multiArrayType
    if array.dataType not in _ARRAY_TYPES:
        raise ConfigError(f"{where} has the unknown type {array.dataType}; convert it as float16, float32 or int32")
    if array.WhichOneof("default") is not None:
        raise ConfigError(f"{where} has a default value, which is not supported; convert it without one")
    flexibility = _flexibility(array)
    shape = tuple(array.shape) if flexibility is None else _varying(flexibility)
    return Feature(
        feature.name,
        TensorType(_ARRAY_TYPES[array.dataType], shape),
        feature.type.isOptional,
        feature.shortDescription,
        flexibility,
    )


def _flexibility(array: Any) -> Flexibility | None:
    kind, default = array.WhichOneof("kind"), tuple(array.shape)
    if kind == "enumeratedShapes":
        return Flexibility(default, shapes=tuple(tuple(one.shape) for one in array.enumeratedShapes.shapes))
    if kind == "shapeRange":
        sides = ((one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges)
        return Flexibility(default, ranges=tuple((least, None if most < 0 else most) for least, most in sides))
    return None


def _varying(flexibility: Flexibility) -> tuple[int | None, ...]:
    if flexibility.ranges:
        return tuple(least if least == most else None for least, most in flexibility.ranges)
    sides = (set(side) for side in zip(*flexibility.shapes, strict=False))
    return tuple(side.pop() if len(side) == 1 else None for side in sides)


def fill_description(description: Any, model: Model) -> None:
    """Write what a model tells of itself into a `ModelDescription`. Raises `UsageError` for what it cannot tell."""
    if model.interfaces:
        description.defaultFunctionName = model.default_function
        for name, interface in model.interfaces.items():
            function = description.functions.add(name=name)
            _fill_interface(function, interface)
    else:
        _fill_interface(description, model.interface)
    told = {
        "shortDescription": model.description,
        "versionString": model.version,
        "author": model.author,
        "license": model.license,
    }
    for name, text in told.items():
        if text:
            setattr(description.metadata, name, text)
    for key, value in sorted(model.metadata.items()):
        description.metadata.userDefined.add(key=key, value=value)


def _fill_interface(description: Any, interface: Interface) -> None:
    _fill_features(description.input, interface.inputs)
    _fill_features(description.output, interface.outputs)


def _fill_features(messages: Any, features: Iterable[Feature]) -> None:
    for feature in features:
        made = messages.add(name=feature.name, shortDescription=feature.description)
        made.type.isOptional = feature.optional
        array = made.type.multiArrayType
        if feature.type.dtype not in _ARRAY_NUMBERS:
            raise UsageError(f"{feature.name!r} is {feature.type}; allowed are {', '.join(_ARRAY_NUMBERS)}")
        array.dataType = _ARRAY_NUMBERS[feature.type.dtype]
        flexibility = feature.flexibility
        if flexibility is None:
            if None in feature.type.shape:
                raise UsageError(f"{feature.name!r} is {feature.type}: say in `flexibility` how its sides may vary")
            array.shape.extend(feature.type.shape)
            continue
        array.shape.extend(flexibility.default)
        for shape in flexibility.shapes:
            array.enumeratedShapes.shapes.add(shape=shape)
        for least, most in flexibility.ranges:
            array.shapeRange.sizeRanges.add(lowerBound=least, upperBound=-1 if most is None else most)
