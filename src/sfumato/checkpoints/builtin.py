"""The small checkpoint that comes with the package."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import UsageError

__all__ = ["builtin_model"]

FOLDER = Path(__file__).parent.parent / "mini"


def builtin_model() -> Path:
    """The folder of the built-in checkpoint. Raises `UsageError` in builds that come without it."""
    if not (FOLDER / "model_index.json").is_file():
        raise UsageError(
            "this build has no built-in model; name one with --model (a folder or a hub id such as 'owner/name')"
        )
    return FOLDER
