"""A checkpoint's sizes, from its configs and the headers of its weight files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.source import open_source
from sfumato.runtime.choices import NETWORKS, Part, Sizes

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.pipelines.source import Source

__all__ = ["read_sizes"]


def read_sizes(
    name: str | PathLike[str] | Source, variant: str | None = None, *, use_safetensors: bool | None = None
) -> Sizes:
    """Return the sizes of a checkpoint in a folder, a file or the hub cache. Reads no weights and downloads nothing.

    Pickled weights (`use_safetensors=False`) have no headers: their parameters are counted from the configs, and their
    bytes from the files. Raises `CheckpointError` or `ConfigError`, which name the file and key.
    """
    files = ComponentFiles(variant, use_safetensors)
    source = open_source(name, files, {"local_files_only": True})
    source.check({})
    roles = [role for roles in NETWORKS.values() for role in roles]
    there = [role for role in roles if source.class_of(role) is not None]
    configs, parts = {role: source.config(role) for role in there}, {role: source.size(role) for role in there}
    return Sizes(
        name=source.name,
        text_encoder_configs=tuple(config for role, config in configs.items() if role.startswith("text")),
        unet_config=configs["unet"],
        vae_config=configs["vae"],
        vision_configs=tuple(config for role, config in configs.items() if role == "image_encoder"),
        text_encoder=sum((parts[role] for role in NETWORKS["text_encoder"] if role in parts), Part(0, 0)),
        unet=parts["unet"],
        vae=parts["vae"],
        tokens=source.tokens,
        spacing=source.load("scheduler").config.get("timestep_spacing", "leading"),
    )
