"""Compiled models (`.mlmodelc`), read and written without Apple's compiler.

A folder contains the program as text (`model.mil`), the same weight file as a package, the interface and metadata in
binary (`coremldata.bin`) and readable form (`metadata.json`), and data for statistics (`analytics/coremldata.bin`).
Apple does not document the format. This code is based on files that Apple's compiler wrote, and reproduces their
`coremldata.bin` byte for byte. Devices compile the text further when they load it.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError

from sfumato.coreml.formats.blob_writer import BlobWriter
from sfumato.coreml.formats.blobs import MODEL_PATH
from sfumato.coreml.formats.check import flaw
from sfumato.coreml.formats.interface_proto import description_fields, fill_description
from sfumato.coreml.formats.metadata import metadata_json
from sfumato.coreml.formats.mil_reader import read_mil
from sfumato.coreml.formats.mil_writer import mil_lines
from sfumato.coreml.formats.pointers import SMALL_FILE, read_bytes
from sfumato.coreml.formats.schema import message
from sfumato.coreml.formats.versions import SYSTEMS, check_spec_version
from sfumato.coreml.program import Interface, Model, Program
from sfumato.errors import CheckpointError, ConfigError, OutputError, UsageError
from sfumato.folders import replacing_folder

__all__ = ["INTERFACE", "coremldata", "read_compiled", "write_compiled"]

INTERFACE = "coremldata.bin"
_PROGRAM = "model.mil"
_WEIGHTS = "weights/weight.bin"
_KIND = b"generic"
# Magic number, version of this file, length of the kind, kind, specification version, length of the rest; magic number.
_HEAD = struct.Struct("<II20xQ7sI28xQ")
_TAIL = struct.Struct("<I12x")
_MARK, _VERSION = 502, 5
_SOURCE = "com.github.apple.coremltools."


def read_compiled(path: Path) -> Model:
    """Read the model in a compiled folder. Its weights are memory-mapped and read on demand.

    Raises `CheckpointError` if anything is missing or damaged, and `ConfigError` if something is not supported: folders
    of the old kind (`model.espresso.net`), compiled pipelines, and programs with state, lists or blocks.
    """
    if not (path / _PROGRAM).exists():
        if any(path.glob("*.espresso.*")):
            raise ConfigError(f"{path} is a compiled neural network; convert the model again, as an ML Program")
        if (path / "model0").is_dir():
            raise ConfigError(f"{path} is a compiled pipeline, which cannot be read; use its package")
    where = path / INTERFACE
    data = read_bytes(where, SMALL_FILE)
    broken = CheckpointError(f"{where} is not that of a compiled ML Program, or is damaged; copy or download it again")
    if len(data) < _HEAD.size + _TAIL.size:
        raise broken
    mark, _, kind_size, kind, spec_version, size = _HEAD.unpack_from(data)
    if mark != _MARK or kind_size != len(_KIND) or kind != _KIND or _HEAD.size + size > len(data):
        raise broken
    check_spec_version(where, spec_version)
    description = message("ModelDescription")
    try:
        description.ParseFromString(data[_HEAD.size : _HEAD.size + size])
    except DecodeError as error:
        raise broken from error
    fields = description_fields(description, str(where))
    model = Model(body=read_mil(path / _PROGRAM), spec_version=spec_version, **fields)
    if wrong := flaw(model):
        raise CheckpointError(f"{path} is damaged: {wrong}; copy or download it again")
    return model


def write_compiled(model: Model, path: Path | str) -> None:
    """Write a model as a compiled folder, completely or not at all. An existing compiled model is replaced.

    Weights are read and written one at a time. Raises `UsageError` if the name does not end in .mlmodelc or the model
    is incomplete, `ConfigError` if the compiled form is unknown (pipelines, several functions, variable shapes, images,
    default values), and `OutputError` if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".mlmodelc":
        raise UsageError(f"{path} is not a valid name for a compiled model; use one that ends in .mlmodelc")
    program = _checked(model)
    if wrong := flaw(model):
        raise UsageError(f"the model is incomplete: {wrong}")
    if path.exists() and not (path / INTERFACE).is_file():
        raise OutputError(f"{path} exists and is not a compiled model; choose another path, or delete it")
    with replacing_folder(path) as folder:
        digest = hashlib.sha256()
        with (
            BlobWriter(folder / _WEIGHTS) as blobs,
            (folder / _PROGRAM).open("w", encoding="utf-8", newline="\n") as file,
        ):
            name = f"{MODEL_PATH}{_WEIGHTS}"
            for line in mil_lines(program, model.spec_version, lambda value: (name, blobs.add(value)), _build(model)):
                file.write(line + "\n")
                digest.update(line.encode())
        (folder / INTERFACE).write_bytes(coremldata(model))
        (folder / "metadata.json").write_text(metadata_json(model, path.stem), encoding="utf-8")
        (folder / "analytics").mkdir()
        (folder / "analytics" / INTERFACE).write_bytes(_analytics(digest.digest()))


def coremldata(model: Model) -> bytes:
    """Return the bytes of `coremldata.bin`: a model's interface and metadata."""
    description = message("ModelDescription")
    fill_description(description, model)
    data = description.SerializeToString(deterministic=True)
    head = _HEAD.pack(_MARK, _VERSION, len(_KIND), _KIND, model.spec_version, len(data))
    return head + data + _TAIL.pack(_MARK)


def _checked(model: Model) -> Program:
    """Return the model's program, or raise `ConfigError` if its compiled form is unknown."""
    advice = "write a package instead, and let Xcode compile it"
    if not isinstance(model.body, Program):
        raise ConfigError(f"the compiled form of a pipeline is unknown; {advice}")
    if model.interfaces or len(model.body.functions) > 1:
        raise ConfigError(f"the compiled form of several functions is unknown; {advice}")
    interface: Interface = model.interface
    for feature in (*interface.inputs, *interface.outputs):
        several = feature.flexibility is not None and "of several shapes"
        what = several or (feature.image and "as an image") or (feature.default is not None and "with a default value")
        if what:
            raise ConfigError(f"the compiled form of {feature.name!r} {what} is unknown; {advice}")
    if model.spec_version not in SYSTEMS:
        raise ConfigError(f"version {model.spec_version} of the Core ML format has no compiled programs; {advice}")
    return model.body


def _build(model: Model) -> Mapping[str, str]:
    """Return the build information: the version of Sfumato, and that of coremltools if the metadata has it."""
    from sfumato import __version__

    tools = model.metadata.get(_SOURCE + "version")
    return {"sfumato-version": __version__, **({"coremltools-version": tools} if tools else {})}


def _analytics(digest: bytes) -> bytes:
    """Return the statistics file: tables of pairs, each string preceded by its length (uint64).

    Apple's compiler stores a hash of the package's program; this stores a hash of the text.
    """
    tables = {
        "NeuralNetworkModelDetails": {"containsCustomLayer": "0", "modelDimension": "0"},
        "SpecificationDetails": {"modelHash": base64.b64encode(digest).decode(), "modelName": "model"},
    }
    parts = []
    for table, pairs in tables.items():
        parts += [_with_length(table), struct.pack("<Q", len(pairs))]
        parts += [_with_length(text) for pair in pairs.items() for text in pair]
    return b"".join(parts)


def _with_length(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
