"""Core ML's files, read and written on any system: packages (`.mlpackage`) and compiled models (`.mlmodelc`)."""

from __future__ import annotations

from pathlib import Path

from sfumato.coreml.formats.compiled import INTERFACE, read_compiled, write_compiled
from sfumato.coreml.formats.package import MANIFEST, read_package, write_package
from sfumato.coreml.formats.proto_reader import read_mlmodel
from sfumato.coreml.program import Model
from sfumato.errors import CheckpointError

__all__ = ["is_model", "read_model", "write_compiled", "write_package"]


def is_model(path: Path | str) -> bool:
    """Whether a path looks like a package, a compiled model or a model's file; nothing is read."""
    path = Path(path)
    inside = ((path / name).is_file() for name in (MANIFEST, INTERFACE, "model.mil"))
    return any(inside) or (path.suffix == ".mlmodel" and path.is_file())


def read_model(path: Path | str) -> Model:
    """The model in a package, a compiled folder or a `.mlmodel` file, whatever its name is.

    Weights stay in their files, which are mapped, until they are asked for. Raises `CheckpointError` if anything is
    missing or damaged, and `ConfigError` for what is not supported.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_mlmodel(path)
    if (path / MANIFEST).exists():
        return read_package(path)
    if (path / INTERFACE).exists() or (path / "model.mil").exists() or any(path.glob("*.espresso.*")):
        return read_compiled(path)
    if not path.exists():
        raise CheckpointError(f"{path} is not there; look at how it is spelled")
    within = [f"{one}" for one in sorted(path.iterdir()) if is_model(one)] if path.is_dir() else []
    hint = f"did you mean {within[0]}?" if within else "is it a .mlpackage or .mlmodelc folder?"
    raise CheckpointError(f"{path} holds neither a package's {MANIFEST} nor a compiled model's {INTERFACE}; {hint}")
