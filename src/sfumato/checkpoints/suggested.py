"""A checkpoint's recommended settings, used where a request leaves them unset."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError
from sfumato.files import read_json
from sfumato.request import GenerateRequest
from sfumato.values import check_value, kinds_of, shown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SETTINGS", "suggested_settings"]

SETTINGS = ("steps", "guidance_scale")


def suggested_settings(folder: Path) -> dict[str, Any]:
    """Return the `GenerateRequest` fields in a checkpoint's `sfumato.json`; empty without such a file.

    Raises `ConfigError` for a field that is not in `SETTINGS` or has an invalid value.
    """
    path = folder / "sfumato.json"
    settings = read_json(path) if os.path.lexists(path) else {}
    for name, value in settings.items():
        if name not in SETTINGS:
            known = " and ".join(SETTINGS)
            raise ConfigError(f"{path}: a checkpoint cannot suggest {shown(name)}; it can suggest {known}")
        check_value(str(path), name, value, kinds_of(GenerateRequest)[name])
    return settings
