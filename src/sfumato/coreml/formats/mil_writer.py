"""Writes programs as `model.mil` text, in the dialect that the target system expects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from sfumato.coreml.formats.blob_writer import StoreWeight
from sfumato.coreml.formats.mil_numbers import quoted, written_array
from sfumato.coreml.formats.values import checked, is_literal, is_weight
from sfumato.coreml.formats.versions import FIRST_1_3, text_opset
from sfumato.coreml.program import Argument, Function, Operation, Output, Program, TensorType, Value

__all__ = ["mil_lines"]

# The indentation that Apple's compiler uses.
_FUNCTION_INDENT, _OPERATION_INDENT = 4 * " ", 12 * " "


def mil_lines(program: Program, spec_version: int, store: StoreWeight, build: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the text lazily, storing the weights that each line refers to.

    `build` is the build information. Raises `ConfigError` for an unknown opset.
    """
    writer = _Writer(spec_version, store)
    pairs = ", ".join(f"{{{quoted(key)}, {quoted(value)}}}" for key, value in sorted(build.items()))
    text = writer.type(TensorType("string"))
    yield f"program({'1.3' if writer.newer else '1.0'})"
    yield f"[buildInfo = dict<{text}, {text}>({{{pairs}}})]"
    yield "{"
    for name, function in program.functions.items():
        yield from writer.function(name, function)
    yield "}"


class _Writer:
    def __init__(self, spec_version: int, store: StoreWeight) -> None:
        self.newer = spec_version >= FIRST_1_3
        self._spec_version = spec_version
        self._store = store

    def function(self, name: str, function: Function) -> Iterator[str]:
        # Sorted by name, as in Apple's compiler.
        inputs = ", ".join(self._output(one) for one in sorted(function.inputs, key=lambda one: one.name))
        yield f"{_FUNCTION_INDENT}func {name}<{text_opset(function.opset)}>({inputs}) {{"
        for operation in function.operations:
            yield _OPERATION_INDENT + self._operation(operation)
        yield f"{2 * _FUNCTION_INDENT}}} -> ({', '.join(function.outputs)});"

    def _operation(self, operation: Operation) -> str:
        literal = is_literal(operation)
        outputs = ", ".join(map(self._output, operation.outputs))
        inputs = _sorted((key, self._argument(key, entries, literal)) for key, entries in operation.inputs.items())
        attributes = _sorted((key, self._value(value, literal)) for key, value in operation.attributes.items())
        return f"{outputs} = {operation.type}({inputs})[{attributes}];"

    def _output(self, output: Output) -> str:
        return f"{self.type(output.type)} {output.name}"

    def _argument(self, key: str, entries: Argument, literal: bool) -> str:
        texts = [entry if isinstance(entry, str) else self._value(entry, literal) for entry in entries]
        return texts[0] if len(texts) == 1 and key != "values" else f"({', '.join(texts)})"

    def type(self, type_: TensorType) -> str:
        if self.newer and not type_.shape:
            return type_.dtype
        sides = ", ".join("?" if side is None else str(side) for side in type_.shape)
        return f"tensor<{type_.dtype}, [{sides}]>"

    def _value(self, value: Value, literal: bool) -> str:
        if is_weight(value, self._spec_version, literal):
            path, offset = self._store(value)
            path_text = f"{self.type(TensorType('string'))}({quoted(path)})"
            inner = f"BLOBFILE(path = {path_text}, offset = {self.type(TensorType('uint64'))}({offset}))"
        else:
            data = checked(value)
            if isinstance(data, np.ndarray):
                inner = written_array(data)
            else:
                inner = f"[{', '.join(map(quoted, data))}]" if value.type.shape else quoted(data[0])
        return f"{self.type(value.type)}({inner})"


def _sorted(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key} = {text}" for key, text in sorted(pairs))
