"""Emits operations in order: names, constants, and the finished model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sfumato.coreml.converter.targets import Target
from sfumato.coreml.program import (
    ARRAY_DTYPES,
    MAIN,
    Argument,
    Feature,
    Function,
    Interface,
    LazyArray,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
    renamed,
)
from sfumato.errors import UsageError

__all__ = ["Constant", "Emitter", "Given", "Handle", "identifier"]

# As in coremltools, shorter constants stay in the program, and longer float constants go to the weight file.
IN_PLACE = 10

# A number, text, or list of numbers that becomes a constant.
Constant = bool | int | str | Sequence[int] | Sequence[bool] | np.ndarray


@dataclass(frozen=True, slots=True)
class Handle:
    """A value of the program under construction: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def type(self) -> TensorType:
        """The type as used in programs."""
        return TensorType(self.dtype, self.shape)


# What an operation accepts as one input.
Given = Handle | Sequence[Handle] | Constant


def identifier(path: str) -> str:
    """Convert the path of a module or parameter to a valid MIL name of letters, digits and underscores."""
    name = re.sub(r"\W", "_", path, flags=re.ASCII)
    return f"_{name}" if name[:1].isdigit() else name


class Emitter:
    """Collects the operations of one function, in which names are unique and equal constants are shared.

    dtype: the precision of the program, "fp16" or "fp32". Raises `UsageError` for any other.
    """

    def __init__(self, target: Target, dtype: str) -> None:
        if dtype not in ("fp16", "fp32"):
            raise UsageError(f"the precision of a program is 'fp16' or 'fp32', not {dtype!r}")
        self.target, self.dtype = target, dtype
        self._operations: list[Operation] = []
        self._inputs: list[Feature] = []
        self._outputs: list[Feature] = []
        self._renamed: dict[str, str] = {}
        self._taken: set[str] = set()
        self._shared: dict[object, Handle] = {}
        self._scope = ""

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """Name operations that are emitted in the block without a name after this module."""
        before, self._scope = self._scope, identifier(path)
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, dtype: str, shape: tuple[int, ...], description: str) -> Handle:
        """Add an input of the function."""
        handle = Handle(self._unique(name), dtype, shape)
        self._inputs.append(Feature(handle.name, handle.type, description=description))
        return handle

    def weight(self, name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Handle:
        """Add a weight in the program's dtype, which is read lazily; the same name returns the same weight."""
        if name not in self._shared:
            value = Value(TensorType(self.dtype, shape), LazyArray(read))
            self._shared[name] = self._constant(self._unique(identifier(name)), value)
        return self._shared[name]

    def constant(self, role: str, number: Constant) -> Handle:
        """Add a constant named after its role; equal constants of the same role are shared."""
        data = number if isinstance(number, str) else _array(number)
        value = Value(TensorType("string"), data) if isinstance(data, str) else _value(data)
        content = data if isinstance(data, str) else data.tobytes()
        key = (role, value.type, content)
        if key not in self._shared:
            self._shared[key] = self._constant(self._unique(f"{role}_0"), value)
        return self._shared[key]

    def emit(
        self,
        kind: str,
        types: TensorType | Sequence[TensorType],
        inputs: Mapping[str, Given],
        *,
        name: str | None = None,
    ) -> tuple[Handle, ...]:
        """Add an operation with results of these types; inputs that are not handles become constants."""
        inputs = {**inputs, **self.target.more_inputs.get(kind, {})}
        arguments = {role: self._argument(role, given) for role, given in inputs.items()}
        base = name or (f"{self._scope}_{kind}" if self._scope else f"{kind}_0")
        types = (types,) if isinstance(types, TensorType) else types
        outputs = tuple(Output(self._unique(base), type_) for type_ in types)
        attributes = {"name": Value(TensorType("string"), outputs[0].name)}
        self._operations.append(Operation(kind, arguments, outputs, attributes))
        return tuple(Handle(output.name, output.type.dtype, _sides(output.type)) for output in outputs)

    def result(self, x: Handle, name: str, description: str) -> None:
        """Return a value from the function under this name; floats are cast to float32, as in Apple's converter."""
        if x.dtype == "fp16":
            (x,) = self.emit("cast", TensorType("fp32", x.shape), {"x": x, "dtype": "fp32"}, name=name)
        if x.name != name:
            self._renamed[x.name] = self._unique(name)
        self._outputs.append(Feature(name, x.type, description=description))

    def model(self, description: str) -> Model:
        """Return the model, with one function and no metadata yet."""
        operations = tuple(renamed(operation, self._renamed) for operation in self._operations)
        function = Function(
            tuple(Output(feature.name, feature.type) for feature in self._inputs),
            tuple(feature.name for feature in self._outputs),
            operations,
            self.target.opset,
        )
        interface = Interface(tuple(self._inputs), tuple(self._outputs))
        return Model(interface, Program({MAIN: function}), self.target.spec_version, description=description)

    def _argument(self, role: str, given: Given) -> Argument:
        if isinstance(given, Handle):
            return (given.name,)
        if isinstance(given, (list, tuple)) and given and all(isinstance(entry, Handle) for entry in given):
            return tuple(entry.name for entry in given if isinstance(entry, Handle))
        return (self.constant(role, given).name,)  # pyright: ignore[reportArgumentType]

    def _constant(self, name: str, value: Value) -> Handle:
        self._operations.append(constant(name, value))
        return Handle(name, value.type.dtype, _sides(value.type))

    def _unique(self, base: str) -> str:
        """Return the name, numbered if it is taken."""
        name, stem, number = base, base.removesuffix("_0"), 0
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name


def _array(number: bool | int | Sequence[int] | Sequence[bool] | np.ndarray) -> np.ndarray:
    if isinstance(number, np.ndarray):
        return number
    array = np.asarray(number)
    return array if array.dtype == np.bool_ else array.astype(np.int32)


def _value(array: np.ndarray) -> Value:
    word = next(word for word, dtype in ARRAY_DTYPES.items() if dtype == array.dtype)
    type_ = TensorType(word, array.shape)
    beside = array.size >= IN_PLACE and array.dtype.kind == "f"
    return Value(type_, LazyArray(lambda: array) if beside else array)


def _sides(type_: TensorType) -> tuple[int, ...]:
    return tuple(side for side in type_.shape if side is not None)
