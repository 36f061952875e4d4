"""Packages (`.mlpackage`): a folder whose manifest locates the model and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from sfumato.coreml.formats.check import flaw
from sfumato.coreml.formats.pointers import SMALL_FILE, read_bytes
from sfumato.coreml.formats.proto_reader import read_mlmodel
from sfumato.coreml.formats.proto_writer import write_mlmodel
from sfumato.coreml.program import Model
from sfumato.errors import CheckpointError, OutputError, UsageError
from sfumato.files import inside, read_json
from sfumato.folders import replacing_folder

__all__ = ["MANIFEST", "read_package", "write_package"]

MANIFEST = "Manifest.json"
_AUTHOR = "com.apple.CoreML"


def read_package(path: Path) -> Model:
    """Read the model in a package. Its weights are memory-mapped and read on demand.

    Raises `CheckpointError` if anything is missing or damaged, and `ConfigError` if something is not supported.
    """
    model = inside(path / "Data", _root(path))
    if not model.exists():
        raise CheckpointError(
            f"{model} is missing, but {path / MANIFEST} points to it; copy or download the package again"
        )
    return read_mlmodel(model)


def _root(path: Path) -> str:
    """Return the model's path in the package's "Data" folder, from the manifest."""
    where = path / MANIFEST
    read_bytes(where, SMALL_FILE)
    manifest = read_json(where)
    items, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    item = items.get(root) if isinstance(items, dict) and isinstance(root, str) else None
    name = item.get("path") if isinstance(item, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{where} does not say where the model is; copy or download the package again")
    return name


def write_package(model: Model, path: Path | str) -> None:
    """Write a model as a package, completely or not at all. An existing package is replaced.

    Weights are read and written one at a time. Raises `UsageError` if the name does not end in .mlpackage or the model
    is incomplete, and `OutputError` if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".mlpackage":
        raise UsageError(f"{path} is not a valid name for a package; use one that ends in .mlpackage")
    if path.exists() and not (path / MANIFEST).is_file():
        raise OutputError(f"{path} exists and is not a package; choose another path, or delete it")
    if wrong := flaw(model):
        raise UsageError(f"the model is incomplete: {wrong}")
    with replacing_folder(path) as folder:
        inner = folder / "Data" / _AUTHOR
        inner.mkdir(parents=True)
        write_mlmodel(model, inner)
        (folder / MANIFEST).write_text(
            json.dumps(_manifest((inner / "weights").exists()), indent=4) + "\n", encoding="utf-8"
        )


def _manifest(with_weights: bool) -> dict[str, Any]:
    root, entries = str(uuid4()).upper(), {}
    items = {root: ("model.mlmodel", "CoreML Model Specification")}
    if with_weights:
        items[str(uuid4()).upper()] = ("weights", "CoreML Model Weights")
    for key, (name, description) in items.items():
        entries[key] = {"author": _AUTHOR, "description": description, "name": name, "path": f"{_AUTHOR}/{name}"}
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
