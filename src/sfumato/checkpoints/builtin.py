"""The small checkpoint that ships with the package, and its relatives: adapters, words and networks made for it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError, MissingExtra, suggest
from sfumato.files import expanded

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["BUILT_IN", "builtin_model", "builtin_name", "builtin_path", "relative_folders", "relatives"]

# The name of this model, in place of a folder or a hub id, also in recipes. Its relatives are "built-in/NAME".
BUILT_IN = "built-in"

FOLDER = Path(__file__).parent.parent / "mini"
RELATIVES = FOLDER / "relatives"
# The larger ones are in a package of their own, so that both stay below 40 MB.
EXTRA, LARGER = "sfumato_relatives", (f"{BUILT_IN}/edges", f"{BUILT_IN}/inpaint")


def builtin_model() -> Path:
    """Return the folder of the built-in checkpoint. Raises `CheckpointError` if the installation lacks it."""
    if not (FOLDER / "model_index.json").is_file():
        raise CheckpointError(f"the built-in model is missing from {FOLDER}; reinstall sfumato, or give another model")
    return FOLDER


def relatives() -> dict[str, Path]:
    """Return the files and folders made for the built-in model, by names such as "built-in/sketch"."""
    inside = [path for folder in relative_folders() for path in folder.iterdir()]
    found = [path for path in inside if path.is_dir() or path.suffix == ".safetensors"]
    return {
        f"{BUILT_IN}/{path.stem}": path for path in sorted(found, key=lambda path: path.name) if path.name[0] != "_"
    }


def relative_folders() -> list[Path]:
    """Return the folders with those of the built-in model's relatives that are installed."""
    extra = find_spec(EXTRA)
    places = [RELATIVES, *map(Path, (extra.submodule_search_locations or ()) if extra is not None else ())]
    return [folder for folder in places if folder.is_dir()]


def builtin_path(name: str | PathLike[str]) -> Path:
    """Return a path with its home folder expanded or, for "built-in/NAME", the path of that relative.

    A file or folder of the user by that name comes first. Raises `CheckpointError` for an unknown relative, and
    `MissingExtra` for one that is not installed.
    """
    path = expanded(name)
    if not isinstance(name, str) or not name.startswith(f"{BUILT_IN}/") or os.path.lexists(path):
        return path
    known = relatives()
    if name in known:
        return known[name]
    if name in LARGER:
        how = "pip install 'sfumato[relatives]' (in a checkout: pip install ./relatives)"
        raise MissingExtra(f"{name} is in a package of its own; install it with {how}")
    every = dict.fromkeys([*known, *LARGER])
    raise CheckpointError(f"there is no {name}{suggest(name, every)}; there are {', '.join(sorted(every))}")


def builtin_name(path: Path | None) -> str:
    """Return the name that means this path on any machine: "built-in/NAME" for a relative, else the path."""
    return f"{BUILT_IN}/{path.stem}" if path is not None and path.parent in relative_folders() else str(path)
