"""User defaults for all commands, such as the default model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.checkpoints.names import EXAMPLE
from sfumato.errors import ConfigError, suggest

__all__ = ["MODEL_VARIABLE", "chosen_model", "config_file", "default_model"]

MODEL_VARIABLE = "SFUMATO_MODEL"
_KEYS = ("model",)


def chosen_model(model: str | None) -> str:
    """Return the model for a command: the value of `--model`, else the default."""
    return default_model()[0] if model is None else model


def default_model() -> tuple[str, str]:
    """Return the default model and where it is set.

    In this order: the environment variable SFUMATO_MODEL, `model` in the config file, the built-in model. Raises
    `ConfigError` if the config file cannot be read.
    """
    if name := os.environ.get(MODEL_VARIABLE):
        return name, MODEL_VARIABLE
    path = config_file()
    name = None if path is None else _read(path).get("model")
    return (BUILT_IN, "no default is set") if name is None else (name, str(path))


def config_file() -> Path | None:
    """Return the path of the config file, whether it exists or not.

    That is $SFUMATO_CONFIG, else `sfumato/config.toml` in $XDG_CONFIG_HOME or ~/.config on Linux, ~/Library/Application
    Support on macOS, and %APPDATA% on Windows. None without a home folder.
    """
    try:
        if chosen := os.environ.get("SFUMATO_CONFIG"):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            folder = Path.home() / "Library" / "Application Support"
        elif sys.platform == "win32":
            folder = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
        else:
            folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return folder / "sfumato" / "config.toml"
    except RuntimeError:
        return None


def _read(path: Path) -> dict[str, str]:
    import tomllib

    from sfumato.files import read_bytes

    if not os.path.lexists(path):
        return {}
    try:
        settings = tomllib.loads(read_bytes(path, 2**20).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}); fix or delete it") from error
    for key, value in settings.items():
        if key not in _KEYS:
            raise ConfigError(f"{path}: there is no setting {key!r}{suggest(key, _KEYS)}; the only one is 'model'")
        if not isinstance(value, str) or not value:
            raise ConfigError(f'{path}: {key} must be a model\'s name in quotes, such as "{EXAMPLE}"')
    return settings
