"""Core ML file formats on any system: packages (`.mlpackage`) and compiled models (`.mlmodelc`)."""

from __future__ import annotations

import os
from pathlib import Path

from sfumato.coreml.formats.compiled import INTERFACE, read_compiled, write_compiled
from sfumato.coreml.formats.package import MANIFEST, read_package, write_package
from sfumato.coreml.formats.proto_reader import read_mlmodel
from sfumato.coreml.program import Model
from sfumato.errors import CheckpointError
from sfumato.files import expanded

__all__ = ["is_model", "read_model", "write_compiled", "write_package"]


def is_model(path: Path | str) -> bool:
    """Return whether a path looks like a package, a compiled model or a model file, without reading it."""
    path = Path(path)
    inside = (os.path.isfile(path / name) for name in (MANIFEST, INTERFACE, "model.mil"))
    return any(inside) or (path.suffix == ".mlmodel" and os.path.isfile(path))


def read_model(path: Path | str) -> Model:
    """Read the model in a package, a compiled folder or a `.mlmodel` file, recognized by its contents.

    Weights are memory-mapped and read on demand. Raises `CheckpointError` if anything is missing or damaged, and
    `ConfigError` if something is not supported.
    """
    path = expanded(path)
    if os.path.isfile(path):
        return read_mlmodel(path)
    if os.path.exists(path / MANIFEST):
        return read_package(path)
    names = (INTERFACE, "model.mil")
    if any(os.path.exists(path / name) for name in names) or any(path.glob("*.espresso.*")):
        return read_compiled(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; check the path")
    within = [f"{one}" for one in sorted(path.iterdir()) if is_model(one)] if path.is_dir() else []
    hint = f"did you mean {within[0]}?" if within else "is it a .mlpackage or .mlmodelc folder?"
    raise CheckpointError(f"{path} contains neither a package's {MANIFEST} nor a compiled model's {INTERFACE}; {hint}")
