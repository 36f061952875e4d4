"""ML Programs in memory: the common form for reading, converting, writing and running.

A `Model` is the contents of a package or a compiled folder: an interface and either one `Program` or, for a pipeline, a
chain of models. A `Program` consists of functions of operations in static single assignment form, as in Core ML's model
intermediate language (MIL). This module does not depend on storage (`formats/`), conversion (`converter/`) or execution
(`runtime/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Protocol

import numpy as np

__all__ = [
    "ARRAY_DTYPES",
    "COLORS",
    "MAIN",
    "SUBBYTE_BITS",
    "Argument",
    "Feature",
    "Flexibility",
    "Function",
    "Interface",
    "LazyArray",
    "Model",
    "Operation",
    "Output",
    "Program",
    "TensorType",
    "Value",
    "Weight",
    "byte_count",
    "constant",
    "renamed",
]

MAIN = "main"

# Bits of the dtypes that are packed into bytes, from the lowest bit up; arrays hold each element as (u)int8.
SUBBYTE_BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "int4": 4}

# Channel orders of images, and their number of channels.
COLORS: Mapping[str, int] = {"RGB": 3, "BGR": 3, "GRAYSCALE": 1, "GRAYSCALE_FLOAT16": 1}

# The dtype names of model.mil, and the arrays that hold their values. bfloat16 is converted to float32 on reading.
ARRAY_DTYPES: Mapping[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "bf16": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "int4": np.dtype(np.int8),
    **{name: np.dtype(np.uint8) for name in SUBBYTE_BITS if name.startswith("u")},
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a tensor: a dtype of `ARRAY_DTYPES` or "string", and its shape, with None for unknown sizes."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if side is None else str(side) for side in self.shape)}]"


class Weight(Protocol):
    """Values that are stored elsewhere, such as in a memory-mapped file, until they are read."""

    def read(self) -> np.ndarray:
        """Return the values in the type's shape, one array element each; a view of the file if possible."""
        ...


@dataclass(frozen=True, slots=True)
class LazyArray:
    """A weight that a function computes on every read, so that it need not be kept in memory."""

    make: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """Return the function's result."""
        return self.make()


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A constant: its type, and its data: an array in the type's shape, text, or a `Weight` that has them."""

    type: TensorType
    data: np.ndarray | str | tuple[str, ...] | Weight

    @property
    def stored(self) -> bool:
        """Whether the data belongs in a weight file rather than in the program."""
        return not isinstance(self.data, (np.ndarray, str, tuple))

    def read(self) -> np.ndarray | str | tuple[str, ...]:
        """Return the array or the text."""
        return self.data.read() if not isinstance(self.data, (np.ndarray, str, tuple)) else self.data


# One input of an operation: names of values computed earlier, or inline constants.
Argument = tuple["str | Value", ...]


@dataclass(frozen=True, slots=True)
class Output:
    """A value that an operation computes or a function takes: its name, unique in the function, and its type."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation. `const` has its value in the attribute "val"; iOS 16's `constexpr_…` use attributes, too.

    Every input is a tuple; only those of `concat`, `stack` and `einsum` (their "values") have more than one entry.
    """

    type: str
    inputs: Mapping[str, Argument]
    outputs: tuple[Output, ...]
    attributes: Mapping[str, Value] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values that it reads, in order; a name is repeated if it is read twice."""
        return tuple(entry for argument in self.inputs.values() for entry in argument if isinstance(entry, str))


@dataclass(frozen=True, slots=True)
class Function:
    """Operations in an order in which they can run. `opset` is "CoreML6" (iOS 16) or later."""

    inputs: tuple[Output, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    opset: str


@dataclass(frozen=True, slots=True)
class Program:
    """Functions by name; most programs have one, `main`."""

    functions: Mapping[str, Function]


@dataclass(frozen=True, slots=True)
class Flexibility:
    """The shapes an input may have, if more than one: those listed in `shapes`, or sizes within `ranges`.

    A range is a minimum and a maximum size, None for no maximum. `default` is the shape to expect if none is given.
    """

    default: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output as callers see it: an array of "fp16", "fp32", "fp64", "int8" or "int32".

    A variable size is None in the type; `flexibility` describes it. default: value to fill a missing input with. image:
    one of `COLORS` for an image, an array (1, C, H, W) of values from 0 to 255; scaling them is part of the program.
    """

    name: str
    type: TensorType
    optional: bool = False
    description: str = ""
    flexibility: Flexibility | None = None
    default: float | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """The inputs and outputs of one function."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """The contents of a package or a compiled folder.

    interface: of the default function; interfaces: of every function by name, if the file describes several.
    body: a program, or the named models of a pipeline, which pass features to each other by name.
    metadata: user-defined entries; author, license, version and description have their own fields.
    """

    interface: Interface
    body: Program | tuple[tuple[str, Model], ...]
    spec_version: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    license: str = ""
    version: str = ""
    description: str = ""
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    default_function: str = MAIN

    @property
    def program(self) -> Program:
        """The program. Raises `TypeError` for a pipeline, which has several."""
        if not isinstance(self.body, Program):
            raise TypeError("a pipeline is not a single program")
        return self.body

    @property
    def functions(self) -> Iterator[Function]:
        """All functions; for a pipeline, those of its models in order."""
        if isinstance(self.body, Program):
            yield from self.body.functions.values()
        else:
            for _, model in self.body:
                yield from model.functions

    def with_functions(self, change: Callable[[Function], Function]) -> Model:
        """Return the same model with every function changed; for a pipeline, the functions of its models."""
        if isinstance(self.body, Program):
            return replace(self, body=Program({name: change(one) for name, one in self.body.functions.items()}))
        return replace(self, body=tuple((name, model.with_functions(change)) for name, model in self.body))


def constant(name: str, value: Value) -> Operation:
    """Return the `const` operation that defines a value under a name."""
    text = Value(TensorType("string"), name)
    return Operation("const", {}, (Output(name, value.type),), {"name": text, "val": value})


def renamed(operation: Operation, names: Mapping[str, str]) -> Operation:
    """Return the operation with values renamed; its own name changes with that of its first output."""
    outputs = tuple(Output(names.get(one.name, one.name), one.type) for one in operation.outputs)
    if outputs == operation.outputs and not names.keys() & {*operation.names}:
        return operation
    inputs = {
        role: tuple(names.get(entry, entry) if isinstance(entry, str) else entry for entry in argument)
        for role, argument in operation.inputs.items()
    }
    attributes = dict(operation.attributes)
    if outputs and "name" in attributes:
        attributes["name"] = Value(TensorType("string"), outputs[0].name)
    return Operation(operation.type, inputs, outputs, attributes)


def byte_count(type_: TensorType) -> int:
    """Return the bytes that a tensor of known shape takes in a weight file."""
    count = prod(side or 0 for side in type_.shape)
    bits = SUBBYTE_BITS.get(type_.dtype)
    if bits is not None:
        return -(-count * bits // 8)
    return count * (2 if type_.dtype == "bf16" else ARRAY_DTYPES[type_.dtype].itemsize)
