"""Builds programs from `model.mlmodel` messages; weights stay in their files until they are needed."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from sfumato.coreml.formats.blobs import WeightFiles
from sfumato.coreml.formats.check import flaw
from sfumato.coreml.formats.interface_proto import description_fields, model_names
from sfumato.coreml.formats.pointers import read_bytes
from sfumato.coreml.formats.schema import message
from sfumato.coreml.formats.values import DATA_TYPES, array_from_bytes, array_from_numbers, member_of
from sfumato.coreml.formats.versions import check_spec_version
from sfumato.coreml.program import (
    ARRAY_DTYPES,
    Argument,
    Function,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    byte_count,
)
from sfumato.errors import CheckpointError, ConfigError

__all__ = ["read_mlmodel"]


def read_mlmodel(path: Path) -> Model:
    """Read the model in a `.mlmodel` file; its weights are next to it.

    Raises `CheckpointError` if the file is missing or damaged, and `ConfigError` if it is not an ML Program or a
    pipeline of them, or has unsupported features.
    """
    spec = message("Model")
    try:
        spec.ParseFromString(read_bytes(path))
    except DecodeError as error:
        raise CheckpointError(f"{path} is not a Core ML model, or damaged; copy or download it again") from error
    model = _model(spec, path, str(path), WeightFiles(path.parent))
    if wrong := flaw(model):
        raise CheckpointError(f"{path} is damaged: {wrong}; copy or download it again")
    return model


def _model(spec: Any, path: Path, where: str, weights: WeightFiles) -> Model:
    kind = spec.WhichOneof("kind")
    if kind is None and not spec.specificationVersion:
        raise CheckpointError(f"{where} is not a Core ML model, or damaged; copy or download it again")
    check_spec_version(path, spec.specificationVersion)
    if kind == "pipeline":
        inner, names = spec.pipeline.models, list(spec.pipeline.names)
        names += model_names(len(inner))[len(names) :]
        body = tuple(
            (name, _model(one, path, f"{where}, model {name!r}", weights))
            for name, one in zip(names, inner, strict=False)
        )
    elif kind == "mlProgram":
        functions = spec.mlProgram.functions
        body = Program(
            {name: _function(functions[name], f"{where}, function {name!r}", weights) for name in sorted(functions)}
        )
    else:
        raise ConfigError(
            f"{where} is a {kind or 'model of an unknown kind'}, not an ML Program; convert it again for iOS 15 or "
            "later"
        )
    return Model(body=body, spec_version=spec.specificationVersion, **description_fields(spec.description, where))


def _function(function: Any, where: str, weights: WeightFiles) -> Function:
    if function.opset not in function.block_specializations:
        raise CheckpointError(f"{where} has no operations for its opset {function.opset!r}; copy or download it again")
    block = function.block_specializations[function.opset]
    reader = _BlockReader(where, weights)
    return Function(
        tuple(reader.output(one) for one in function.inputs),
        tuple(block.outputs),
        tuple(reader.operation(one) for one in block.operations),
        function.opset,
    )


class _BlockReader:
    """Reads the operations of one function. `_place` is the current operation, for error messages."""

    def __init__(self, where: str, weights: WeightFiles) -> None:
        self._where = where
        self._place = ""
        self._weights = weights
        self._types: dict[bytes, TensorType] = {}

    def _fail(self, sentence: str, error: Callable[[str], Exception] = CheckpointError) -> Exception:
        return error(f"{self._where}{self._place}: {sentence}")

    def operation(self, operation: Any) -> Operation:
        kind = operation.type
        outputs = operation.outputs
        self._place = f", operation {kind} {outputs[0].name if outputs else ''!r}"
        if operation.blocks:
            raise self._fail("it contains nested blocks of operations, which are not supported", ConfigError)
        inputs, attributes = operation.inputs, operation.attributes
        return Operation(
            kind,
            {name: self._argument(inputs[name]) for name in sorted(inputs)},
            tuple(self.output(one) for one in outputs),
            {name: self.value(attributes[name]) for name in sorted(attributes)},
        )

    def output(self, named: Any) -> Output:
        return Output(named.name, self.type(named.type))

    def _argument(self, argument: Any) -> Argument:
        return tuple(one.name or self.value(one.value) for one in argument.arguments)

    def type(self, value_type: Any) -> TensorType:
        kind = value_type.WhichOneof("kind")
        if kind != "tensorType":
            what = str(kind).removesuffix("Type")
            raise self._fail(f"it has a {what}, and only tensors are supported", ConfigError)
        key = value_type.SerializeToString()
        if key not in self._types:
            self._types[key] = self._tensor_type(value_type.tensorType)
        return self._types[key]

    def _tensor_type(self, tensor: Any) -> TensorType:
        if tensor.dataType not in DATA_TYPES:
            raise self._fail(f"it has values of the unknown type {tensor.dataType}", ConfigError)
        sides = []
        for dimension in tensor.dimensions:
            known = dimension.WhichOneof("kind") == "constant"
            if not known and dimension.unknown.variadic:
                raise self._fail("it has a tensor of unknown rank, which is not supported", ConfigError)
            sides.append(dimension.constant.size if known else None)
        if tensor.rank != len(sides):
            raise self._fail(
                f"it has a tensor of rank {tensor.rank} with {len(sides)} sides; copy or download it again"
            )
        return TensorType(DATA_TYPES[tensor.dataType], tuple(sides))

    def value(self, value: Any) -> Value:
        type_ = self.type(value.type)
        if value.WhichOneof("kind") == "blobFileValue":
            blob = value.blobFileValue
            return self._weights.value(type_, blob.fileName, blob.offset)
        immediate = value.immediateValue
        if immediate.WhichOneof("kind") != "tensor":
            raise self._fail(f"it has a {immediate.WhichOneof('kind')}, and only tensors are supported", ConfigError)
        return self._immediate(immediate.tensor, type_)

    def _immediate(self, tensor: Any, type_: TensorType) -> Value:
        if None in type_.shape:
            raise self._fail(f"it has a constant of the unknown shape {type_}; copy or download it again")
        shape = tuple(side or 0 for side in type_.shape)
        member = tensor.WhichOneof("kind") or member_of(type_.dtype)
        numbers = getattr(tensor, member).values
        if type_.dtype != "string" and type_.dtype not in ARRAY_DTYPES:
            raise self._fail(f"it has values of type {type_.dtype}, which is not supported", ConfigError)
        is_text = type_.dtype == "string"
        expected = byte_count(type_) if member == "bytes" and not is_text else prod(shape)
        if len(numbers) != expected or is_text != (member == "strings"):
            raise self._fail(f"it has a constant {type_} with {len(numbers)} {member}; copy or download it again")
        if member == "strings":
            return Value(type_, tuple(numbers) if shape else numbers[0])
        if member == "bytes":
            # Copy, because bytes are read-only, and torch warns about read-only arrays.
            return Value(type_, array_from_bytes(numbers, type_.dtype, shape).copy())
        return Value(type_, array_from_numbers(numbers, type_.dtype, shape))
