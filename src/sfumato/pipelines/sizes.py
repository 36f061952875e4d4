"""The sizes of a checkpoint, from its configs and the headers of its weight files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.weights import find_weights, read_headers
from sfumato.configs import parse
from sfumato.errors import CheckpointError
from sfumato.files import read_json
from sfumato.pipelines.components import INDEX, ComponentFiles, component_class
from sfumato.runtime.choices import PARTS, Part, Sizes, count_parameters
from sfumato.text.tokenizer import prompt_length

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["read_sizes"]


def read_sizes(name: str | PathLike[str], variant: str | None = None, *, use_safetensors: bool | None = None) -> Sizes:
    """What a checkpoint in a folder, or in the hub's cache, takes; no weight is read and nothing is downloaded.

    Pickled weights (`use_safetensors=False`) have no headers: for them the parameters are counted from the configs and
    the files' bytes. Raises `CheckpointError` or `ConfigError` naming file and key.
    """
    files = ComponentFiles(variant, use_safetensors)
    folder = locate_folder(name, files.select, local_files_only=True)
    index = read_json(folder / INDEX)
    values: dict[str, Any] = {}
    names: list[str] = []
    for part in PARTS:
        cls = component_class(folder, index, part)
        values[f"{part}_config"], _ = parse(cls.config_class, read_json(folder / part / "config.json"))
        found = find_weights(folder / part, cls.weights_name, variant=variant, use_safetensors=use_safetensors)
        names += [file.name for file in found]
        if use_safetensors is False:
            values[part] = Part(count_parameters(values[f"{part}_config"]), sum(file.stat().st_size for file in found))
            continue
        headers = read_headers(found).values()
        values[part] = Part(sum(header.count for header in headers), sum(header.bytes for header in headers))
    if variant and not any(f".{variant}" in name for name in names):
        raise CheckpointError(f"{folder} has no variant {variant!r}; leave variant out to use the plain weights")
    path = folder / "tokenizer" / "tokenizer_config.json"
    return Sizes(name=str(name), tokens=prompt_length(read_json(path) if path.is_file() else {}), **values)
