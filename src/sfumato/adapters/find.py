"""Finding adapters and embeddings: a file, a file in a folder, or one in a hub repository."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sfumato.adapters.files import PICKLED
from sfumato.checkpoints.builtin import builtin_path
from sfumato.checkpoints.locate import locate_folder
from sfumato.errors import CheckpointError, suggest
from sfumato.files import names_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from pathlib import Path

__all__ = ["find_file"]

ADAPTERS = ("pytorch_lora_weights", "adapter_model")
EMBEDDINGS = ("learned_embeds",)


def find_file(
    name: str | PathLike[str],
    usual: Sequence[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    pickled: bool = False,
    **hub: Any,
) -> Path:
    """Find a file by the path of the file itself, or of a folder or hub repository that contains it.

    weight_name: its name in the folder (default: a usual one); usual: stems of usual names; pickled: whether pickled
    files are allowed. Raises `CheckpointError` if no file or several files match.
    """
    path = builtin_path(name)
    if os.path.isfile(path):
        return path
    if path.suffix in (".safetensors", *PICKLED):
        raise CheckpointError(f"{path} is missing; check the path, or give a folder or a hub id")
    prefix = f"{subfolder}/" if subfolder else ""

    def select(names: Sequence[str], strict: bool) -> list[str]:
        inside = [one.removeprefix(prefix) for one in names if one.startswith(prefix) and "/" not in one[len(prefix) :]]
        return [prefix + _chosen(str(name), inside, usual, weight_name, pickled)]

    place = locate_folder(name, select, **hub) / (subfolder or "")
    return place / _chosen(str(place), names_in(place), usual, weight_name, pickled)


def _chosen(where: str, names: Any, usual: Sequence[str], weight_name: str | None, pickled: bool) -> str:
    endings = (".safetensors", *PICKLED) if pickled else (".safetensors",)
    files = sorted(one for one in names if one.endswith(endings))
    if weight_name is not None:
        if weight_name not in names:
            raise CheckpointError(f"{where} has no {weight_name}{suggest(weight_name, files)}; it has {_some(files)}")
        return weight_name
    likely = [stem + ending for stem in usual for ending in endings if stem + ending in files]
    if likely or len(files) == 1:
        return (likely or files)[0]
    raise CheckpointError(f"{where} has {_some(files)}; choose one with weight_name=…, or give the file itself")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if names else "no such files"
