"""The small checkpoint that ships with the package."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import CheckpointError

__all__ = ["BUILT_IN", "builtin_model"]

# The name of this model, in place of a folder or a hub id, also in recipes.
BUILT_IN = "built-in"

FOLDER = Path(__file__).parent.parent / "mini"


def builtin_model() -> Path:
    """Return the folder of the built-in checkpoint. Raises `CheckpointError` if the installation lacks it."""
    if not (FOLDER / "model_index.json").is_file():
        raise CheckpointError(f"the built-in model is missing from {FOLDER}; reinstall sfumato, or give another model")
    return FOLDER
