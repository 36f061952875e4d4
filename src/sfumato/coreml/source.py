"""The checkpoint that Core ML models are made from, or proved against: its networks, loaded one at a time."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.errors import ConfigError
from sfumato.files import read_json
from sfumato.pipelines.components import INDEX, ComponentFiles, component_class
from sfumato.pipelines.recipe import fingerprint
from sfumato.pipelines.sizes import read_sizes
from sfumato.text.tokenizer import CLIPTokenizer

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from sfumato.models.base import Model
    from sfumato.runtime.choices import Sizes

__all__ = ["NETWORK_OF", "Source", "open_source"]

# The network that each part is made from.
NETWORK_OF = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and how its weights are to be read."""

    name: str
    folder: Path
    variant: str | None = None
    use_safetensors: bool | None = None

    @property
    def label(self) -> str:
        """What files are named after: the hub id, or the name of the folder without the way to it."""
        return Path(os.path.abspath(self.folder)).name if Path(self.name).expanduser().is_dir() else self.name

    def load(self, part: str, dtype: torch.dtype | None = None) -> Model:
        """The network that a part of Core ML is made from, on the CPU; mapped from its file in the stored precision.

        Raises `CheckpointError` or `ConfigError` naming file and key.
        """
        network = NETWORK_OF[part]
        cls = component_class(self.folder, self._index, network)
        return cls.from_folder(
            self.folder / network, dtype=dtype, variant=self.variant, use_safetensors=self.use_safetensors
        )

    def config(self, network: str) -> dict[str, Any]:
        """The config of a network, as its file has it."""
        return read_json(self.folder / network / "config.json")

    def check(self) -> None:
        """Raise what would be raised later, before any work: each network's class, config and weight files."""
        for network in dict.fromkeys(NETWORK_OF.values()):
            component_class(self.folder, self._index, network)
        if component_class(self.folder, self._index, "vae").__name__ != "AutoencoderKL":
            raise ConfigError(
                f"{self.folder / INDEX}: the vae is an AutoencoderTiny, which has no Core ML form here; "
                "convert the checkpoint with its full autoencoder"
            )

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters and bytes of each network, from the headers."""
        return read_sizes(self.folder, self.variant, use_safetensors=self.use_safetensors)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer."""
        return CLIPTokenizer.from_folder(self.folder / "tokenizer")

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The config of the checkpoint's own scheduler, its class among the keys."""
        cls = component_class(self.folder, self._index, "scheduler")
        config = cls.from_pretrained(self.folder, subfolder="scheduler").config.to_dict()
        return json.loads(json.dumps(config)) | {"_class_name": cls.__name__}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Steps and guidance scale that the checkpoint asks for, if it does."""
        return suggested_settings(self.folder)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash for each network, the same in every precision (pipelines/recipe.py)."""
        one_part_of = {network: part for part, network in NETWORK_OF.items()}
        return {network: fingerprint(self.load(part)) for network, part in one_part_of.items()}

    @cached_property
    def hash(self) -> str:
        """The hash of the whole checkpoint, as recipes of pictures carry it."""
        prints = self.fingerprints
        joined = "".join(prints[network] for network in ("text_encoder", "unet", "vae"))
        return hashlib.sha256(joined.encode()).hexdigest()[:32]

    @cached_property
    def _index(self) -> dict[str, Any]:
        return read_json(self.folder / INDEX)


def open_source(
    name: str | PathLike[str] = BUILT_IN,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Source:
    """A checkpoint by folder, hub id or "built-in"; downloaded if it is not here. Loads no weights.

    Hub keywords: cache_dir, revision, token, local_files_only, force_download. Raises `CheckpointError` in a sentence.
    """
    files = ComponentFiles(variant, use_safetensors)
    folder = locate_folder(name, files.select, **hub)
    source = Source(str(name), folder, variant, use_safetensors)
    source.check()
    return source
