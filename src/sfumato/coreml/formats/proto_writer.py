"""Builds `model.mlmodel` messages from programs, and writes weights to their files one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sfumato.coreml.formats.blob_writer import BlobWriter, StoreWeight
from sfumato.coreml.formats.blobs import MODEL_PATH
from sfumato.coreml.formats.interface_proto import fill_description, model_names
from sfumato.coreml.formats.schema import message
from sfumato.coreml.formats.values import DATA_TYPES, bytes_from_array, checked, is_literal, is_weight, member_of
from sfumato.coreml.program import Function, Model, Operation, Program, TensorType, Value

__all__ = ["write_mlmodel"]

_NUMBERS = {dtype: number for number, dtype in DATA_TYPES.items()}
_FOLDER = "weights"


def write_mlmodel(model: Model, folder: Path) -> None:
    """Write `model.mlmodel` and its weight files to a folder.

    A program has `weights/weight.bin`; the models of a pipeline have `weights/0-weight.bin` and so on. Raises `OSError`
    if writing fails, and `UsageError` if the model is incomplete.
    """
    spec = message("Model")
    _fill_model(spec, model, folder, "")
    (folder / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))


def _fill_model(spec: Any, model: Model, folder: Path, prefix: str) -> None:
    spec.specificationVersion = model.spec_version
    fill_description(spec.description, model)
    if not isinstance(model.body, Program):
        names = [name for name, _ in model.body]
        if names != model_names(len(names)):
            spec.pipeline.names.extend(names)
        for index, (_, inner) in enumerate(model.body):
            _fill_model(spec.pipeline.models.add(), inner, folder, f"{prefix}{index}-")
        return
    spec.mlProgram.version = 1
    with BlobWriter(folder / _FOLDER / f"{prefix}weight.bin") as blobs:
        name = f"{MODEL_PATH}{_FOLDER}/{blobs.path.name}"
        writer = _ProgramWriter(lambda value: (name, blobs.add(value)), model.spec_version)
        for key, function in model.body.functions.items():
            writer.function(spec.mlProgram.functions[key], function)


class _ProgramWriter:
    def __init__(self, store: StoreWeight, spec_version: int) -> None:
        self._store = store
        self._spec_version = spec_version

    def function(self, spec: Any, function: Function) -> None:
        spec.opset = function.opset
        for one in function.inputs:
            _fill_type(spec.inputs.add(name=one.name).type, one.type)
        block = spec.block_specializations[function.opset]
        block.outputs.extend(function.outputs)
        for operation in function.operations:
            self._operation(block.operations.add(type=operation.type), operation)

    def _operation(self, spec: Any, operation: Operation) -> None:
        literal = is_literal(operation)
        for one in operation.outputs:
            _fill_type(spec.outputs.add(name=one.name).type, one.type)
        for name, value in operation.attributes.items():
            self._value(spec.attributes[name], value, literal)
        for name, argument in operation.inputs.items():
            entries = spec.inputs[name].arguments
            for entry in argument:
                if isinstance(entry, str):
                    entries.add(name=entry)
                else:
                    self._value(entries.add().value, entry, literal)

    def _value(self, spec: Any, value: Value, literal: bool) -> None:
        _fill_type(spec.type, value.type)
        if is_weight(value, self._spec_version, literal):
            spec.blobFileValue.fileName, spec.blobFileValue.offset = self._store(value)
        else:
            _fill_immediate(spec.immediateValue.tensor, value)


def _fill_type(spec: Any, type_: TensorType) -> None:
    tensor = spec.tensorType
    tensor.dataType, tensor.rank = _NUMBERS[type_.dtype], len(type_.shape)
    for side in type_.shape:
        if side is None:
            tensor.dimensions.add().unknown.SetInParent()
        else:
            tensor.dimensions.add().constant.size = side


def _fill_immediate(tensor: Any, value: Value) -> None:
    dtype, data = value.type.dtype, checked(value)
    member = getattr(tensor, member_of(dtype))
    member.SetInParent()
    if not isinstance(data, np.ndarray):
        member.values.extend(data)
    elif member_of(dtype) == "bytes":
        member.values = bytes_from_array(data, dtype).tobytes()
    else:
        wide = data.view(np.int64) if dtype == "uint64" else data
        member.values.extend(wide.reshape(-1).tolist())
