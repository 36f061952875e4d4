"""The `ModelDescription` message: interfaces and metadata of packages and compiled models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sfumato.coreml.program import COLORS, MAIN, Feature, Flexibility, Interface, Model, TensorType
from sfumato.errors import ConfigError, UsageError

__all__ = ["description_fields", "fill_description", "model_names"]

# ArrayFeatureType.ArrayDataType.
_ARRAY_TYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131080: "int8", 131104: "int32"}
_ARRAY_NUMBERS = {dtype: number for number, dtype in _ARRAY_TYPES.items()}
# ImageFeatureType.ColorSpace.
_COLORS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}
_COLOR_NUMBERS = {word: number for number, word in _COLORS.items()}
_DEFAULTS = {"int8": "intDefaultValue", "int32": "intDefaultValue", "fp64": "doubleDefaultValue"}
_KINDS = {
    "dictionaryType": "a dictionary",
    "sequenceType": "a sequence",
    "stateType": "a state",
    "stringType": "a text",
    "int64Type": "a single number",
    "doubleType": "a single number",
}


def description_fields(description: Any, where: str) -> dict[str, Any]:
    """Return the fields of a `Model` that a `ModelDescription` contains. `where` is the start of error messages.

    Raises `ConfigError` for features that are neither arrays nor images, and for state.
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
    """Return the default names of the models of a pipeline."""
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
    if kind == "imageType":
        dtype, flexibility, shape, more = _image(feature.type.imageType, where)
    elif kind == "multiArrayType":
        dtype, flexibility, shape, more = _array(feature.type.multiArrayType, where)
    else:
        what = _KINDS.get(str(kind), "of no type")
        raise ConfigError(f"{where} is {what}, but only arrays and images are supported; convert it as an array")
    sides = shape if flexibility is None else _varying(flexibility)
    type_, optional = TensorType(dtype, sides), feature.type.isOptional
    return Feature(feature.name, type_, optional, feature.shortDescription, flexibility, **more)


_Read = tuple[str, Flexibility | None, tuple[int, ...], dict[str, Any]]


def _array(array: Any, where: str) -> _Read:
    """Return dtype, flexibility, shape, and the other fields of a `Feature` for an array."""
    if array.dataType not in _ARRAY_TYPES:
        raise ConfigError(f"{where} has the unknown type {array.dataType}; convert it as float16, float32 or int32")
    default = array.WhichOneof("default")
    more = {} if default is None else {"default": getattr(array, default)}
    return _ARRAY_TYPES[array.dataType], _flexibility(array), tuple(array.shape), more


def _image(image: Any, where: str) -> _Read:
    """Return the same for an image, as an array (1, C, H, W)."""
    if image.colorSpace not in _COLORS:
        raise ConfigError(f"{where} has the unknown color space {image.colorSpace}; convert it as RGB or grayscale")
    color = _COLORS[image.colorSpace]
    channels, kind = COLORS[color], image.WhichOneof("kind")
    shape, flexibility = (1, channels, image.height, image.width), None
    if kind == "enumeratedSizes":
        sizes = ((1, channels, one.height, one.width) for one in image.enumeratedSizes.sizes)
        flexibility = Flexibility(shape, shapes=tuple(sizes))
    elif kind == "imageSizeRange":
        sizes = (_range(one) for one in (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange))
        flexibility = Flexibility(shape, ranges=((1, 1), (channels, channels), *sizes))
    return "fp16" if color.endswith("FLOAT16") else "fp32", flexibility, shape, {"image": color}


def _range(one: Any) -> tuple[int, int | None]:
    return one.lowerBound, None if one.upperBound < 0 else one.upperBound


def _flexibility(array: Any) -> Flexibility | None:
    kind, default = array.WhichOneof("kind"), tuple(array.shape)
    if kind == "enumeratedShapes":
        return Flexibility(default, shapes=tuple(tuple(one.shape) for one in array.enumeratedShapes.shapes))
    if kind == "shapeRange":
        return Flexibility(default, ranges=tuple(_range(one) for one in array.shapeRange.sizeRanges))
    return None


def _varying(flexibility: Flexibility) -> tuple[int | None, ...]:
    if flexibility.ranges:
        return tuple(least if least == most else None for least, most in flexibility.ranges)
    sides = (set(side) for side in zip(*flexibility.shapes, strict=False))
    return tuple(side.pop() if len(side) == 1 else None for side in sides)


def fill_description(description: Any, model: Model) -> None:
    """Write a model's interface and metadata to a `ModelDescription`. Raises `UsageError` if it cannot express them."""
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
        if feature.flexibility is None and None in feature.type.shape:
            raise UsageError(f"{feature.name!r} is {feature.type}: set `flexibility` to the shapes it may have")
        if feature.image is None:
            _fill_array(made.type.multiArrayType, feature)
        else:
            _fill_image(made.type.imageType, feature)


def _fill_array(array: Any, feature: Feature) -> None:
    if feature.type.dtype not in _ARRAY_NUMBERS:
        raise UsageError(f"{feature.name!r} is {feature.type}; allowed are {', '.join(_ARRAY_NUMBERS)}")
    array.dataType = _ARRAY_NUMBERS[feature.type.dtype]
    if feature.default is not None:
        setattr(array, _DEFAULTS.get(feature.type.dtype, "floatDefaultValue"), feature.default)
    flexibility = feature.flexibility
    array.shape.extend(feature.type.shape if flexibility is None else flexibility.default)
    for shape in () if flexibility is None else flexibility.shapes:
        array.enumeratedShapes.shapes.add(shape=shape)
    for least, most in () if flexibility is None else flexibility.ranges:
        array.shapeRange.sizeRanges.add(lowerBound=least, upperBound=-1 if most is None else most)


def _fill_image(image: Any, feature: Feature) -> None:
    image.colorSpace = _COLOR_NUMBERS[str(feature.image)]
    flexibility = feature.flexibility
    _, _, image.height, image.width = feature.type.shape if flexibility is None else flexibility.default
    for _, _, height, width in () if flexibility is None else flexibility.shapes:
        image.enumeratedSizes.sizes.add(height=height, width=width)
    sizes = image.imageSizeRange
    ranges = () if flexibility is None or not flexibility.ranges else (sizes.heightRange, sizes.widthRange)
    for one, (least, most) in zip(ranges, flexibility.ranges[2:] if flexibility else (), strict=True):
        one.lowerBound, one.upperBound = least, -1 if most is None else most
