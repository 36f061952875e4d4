"""The settings a checkpoint asks for, where a request leaves them open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError
from sfumato.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SETTINGS", "suggested_settings"]

SETTINGS = ("steps", "guidance_scale")


def suggested_settings(folder: Path) -> dict[str, Any]:
    """`sfumato.json` beside the index: fields of a `GenerateRequest`. Empty where a checkpoint has no such file.

    Raises `ConfigError` for a field that is none of `SETTINGS`.
    """
    path = folder / "sfumato.json"
    settings = read_json(path) if path.is_file() else {}
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(f"{path}: a checkpoint cannot suggest {name!r}; it can suggest {' and '.join(SETTINGS)}")
    return settings
