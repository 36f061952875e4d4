"""Checks that fail before torch, which takes seconds to import, is loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError, suggest

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.request import GenerateRequest

__all__ = ["check_choices", "check_folder", "check_model", "check_picture"]

_DEVICES = ("cpu", "cuda", "mps")


def check_model(name: str, request: GenerateRequest | None = None, *, downloads: bool = True) -> None:
    """Raise if a model does not exist, is not a pipeline, or cannot generate images of the requested size.

    downloads: whether a missing model will be downloaded; otherwise that is an error.
    """
    from sfumato.checkpoints.locate import find_folder, index_of
    from sfumato.checkpoints.locate_file import check_file_name, is_single_file
    from sfumato.files import check_file, expanded

    if is_single_file(name):
        check_file_name(name)
        return
    folder = find_folder(name, required=not downloads)
    if folder is None:
        return
    if folder == expanded(name):  # a cache may lack files that will be downloaded
        check_file(index_of(folder))
    if request is not None:
        _check_size(folder, request)


def _check_size(folder: Path, request: GenerateRequest) -> None:
    from sfumato.configs import AutoencoderKLConfig, AutoencoderTinyConfig, parse
    from sfumato.files import read_json
    from sfumato.runtime.choices import check_sides

    path = folder / "vae" / "config.json"
    if (request.width or request.height) and path.is_file():
        values = read_json(path)
        kind = AutoencoderTinyConfig if values.get("_class_name") == "AutoencoderTiny" else AutoencoderKLConfig
        check_sides(parse(kind, values, path)[0].scale_factor, width=request.width, height=request.height)


def check_choices(device: str | None, **wishes: Any) -> None:
    """Raise `UsageError` for a device, dtype or other choice that does not exist on any machine."""
    if any(wish is not None for wish in wishes.values()):
        from sfumato.runtime.choices import Wishes

        Wishes(**wishes)
    if device is not None and device.partition(":")[0] not in ("auto", *_DEVICES):
        raise UsageError(f"there is no device {device!r}{suggest(device, _DEVICES)}; use cuda, mps or cpu")


def check_folder(folder: str | Path) -> None:
    """Raise `CheckpointError` if there is nothing at this path."""
    from sfumato.errors import CheckpointError
    from sfumato.files import expanded

    if not os.path.lexists(expanded(folder)):
        raise CheckpointError(f"there is no folder {folder}; give the one that contains the converted models")


def check_picture(path: str | Path) -> None:
    """Raise `UsageError` if there is nothing at this path."""
    from sfumato.files import expanded

    if not os.path.lexists(expanded(path)):
        raise UsageError(f"there is no image {path}; check the path")
