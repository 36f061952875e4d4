"""The small checkpoint that ships with the package, and its relatives: adapters, words and networks made for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError, suggest
from sfumato.files import expanded

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["BUILT_IN", "builtin_model", "builtin_name", "builtin_path", "relatives"]

# The name of this model, in place of a folder or a hub id, also in recipes. Its relatives are "built-in/NAME".
BUILT_IN = "built-in"

FOLDER = Path(__file__).parent.parent / "mini"
RELATIVES = FOLDER / "relatives"


def builtin_model() -> Path:
    """Return the folder of the built-in checkpoint. Raises `CheckpointError` if the installation lacks it."""
    if not (FOLDER / "model_index.json").is_file():
        raise CheckpointError(f"the built-in model is missing from {FOLDER}; reinstall sfumato, or give another model")
    return FOLDER


def relatives() -> dict[str, Path]:
    """Return the files and folders made for the built-in model, by names such as "built-in/pixel-art"."""
    return {f"{BUILT_IN}/{path.stem}": path for path in sorted(RELATIVES.iterdir())} if RELATIVES.is_dir() else {}


def builtin_path(name: str | PathLike[str]) -> Path:
    """Return a path with its home folder expanded or, for "built-in/NAME", the path of that relative.

    A file or folder of the user by that name comes first. Raises `CheckpointError` for an unknown relative.
    """
    path = expanded(name)
    if not isinstance(name, str) or not name.startswith(f"{BUILT_IN}/") or os.path.lexists(path):
        return path
    known = relatives()
    if name not in known:
        raise CheckpointError(f"there is no {name}{suggest(name, known)}; there are {', '.join(known)}")
    return known[name]


def builtin_name(path: Path | None) -> str:
    """Return the name that means this path on any machine: "built-in/NAME" for a relative, else the path."""
    return f"{BUILT_IN}/{path.stem}" if path is not None and path.parent == RELATIVES else str(path)
