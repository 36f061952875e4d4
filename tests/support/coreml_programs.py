"""Small ML Programs for tests, and the runtime's answer to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.coreml.program import (
    Feature,
    Function,
    Interface,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
)
from sfumato.coreml.runtime import Predictor

WORDS = {"float16": "fp16", "float32": "fp32", "float64": "fp64"}


def type_of(array: np.ndarray) -> TensorType:
    return TensorType(WORDS.get(array.dtype.name, array.dtype.name), array.shape)


def value(data: Any) -> Value:
    """A constant: text, a number (int32 or fp32), or an array in its own type."""
    if isinstance(data, str):
        return Value(TensorType("string"), data)
    array = np.asarray(data)
    if not isinstance(data, (np.ndarray, np.generic)):
        array = array.astype({"f": np.float32, "i": np.int32, "b": np.bool_}[array.dtype.kind])
    return Value(type_of(array), array)


def operation(kind: str, outputs: dict[str, TensorType], /, **inputs: Any) -> Operation:
    """An operation whose inputs are names (in a tuple, or as `ref`), or constants in place."""
    arguments = {name: given if isinstance(given, tuple) else (value(given),) for name, given in inputs.items()}
    return Operation(kind, arguments, tuple(Output(name, type_) for name, type_ in outputs.items()))


def model(
    inputs: dict[str, TensorType], outputs: dict[str, TensorType], *operations: Operation, opset: str = "CoreML7"
) -> Model:
    """A program of one function, its interface that of the function."""
    function = Function(tuple(Output(name, type_) for name, type_ in inputs.items()), tuple(outputs), operations, opset)
    interface = Interface(
        tuple(Feature(name, type_) for name, type_ in inputs.items()),
        tuple(Feature(name, type_) for name, type_ in outputs.items()),
    )
    return Model(interface, Program({"main": function}), 8)


def answers(
    kind: str, tensors: dict[str, Any], results: list[TensorType], /, precision: str = "typed", **parameters: Any
) -> list[np.ndarray]:
    """What one operation makes of tensors (an array, or a list of arrays for a variadic input)."""
    arguments: dict[str, Any] = {}
    given: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        each = tensor if isinstance(tensor, list) else [tensor]
        names = tuple(f"{name}_{place}" for place in range(len(each)))
        given.update(zip(names, each, strict=True))
        arguments[name] = names
    outputs = {f"out_{place}": type_ for place, type_ in enumerate(results)}
    one = operation(kind, outputs, **arguments, **parameters)
    made = model({name: type_of(array) for name, array in given.items()}, outputs, one)
    found = Predictor(made, precision=precision).run({name: _tensor(array) for name, array in given.items()})
    return [found[name].numpy() for name in outputs]


def answer(kind: str, tensors: dict[str, Any], like: np.ndarray, /, **parameters: Any) -> np.ndarray:
    """The same for an operation with one result, which has the type and shape of another array."""
    (found,) = answers(kind, tensors, [type_of(like)], **parameters)
    return found


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(array, order="C"))
