"""Optional dependencies of bulk jobs, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sfumato.errors import MissingExtra

__all__ = ["arrow", "ray"]


def arrow(module: str = "pyarrow") -> Any:
    """Import pyarrow or one of its modules. Raises `MissingExtra`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra("bulk jobs need pyarrow; type: pip install 'sfumato[bulk]'") from error


def ray() -> Any:
    """Import Ray. Raises `MissingExtra`."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingExtra("Ray is not installed; type: pip install 'sfumato[ray]'") from error
