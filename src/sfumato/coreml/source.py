"""The source checkpoint of a conversion or verification: its networks, loaded one at a time."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters.outfit import wear
from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.checkpoints.locate import full_name
from sfumato.errors import ConfigError
from sfumato.files import expanded
from sfumato.pipelines.additions import read_adapters
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.pipelines.recipe import joined_hash
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.source import Source as Checkpoint
from sfumato.pipelines.source import open_source as open_checkpoint

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from sfumato.adapters.outfit import Worn
    from sfumato.models.base import Model
    from sfumato.request import AdapterFile
    from sfumato.runtime.choices import Sizes
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["NETWORK_OF", "Source", "open_source"]

# The network that each part is converted from.
NETWORK_OF = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


@dataclass(frozen=True)
class Source:
    """A checkpoint in a folder or a file, as the source of Core ML models."""

    name: str
    checkpoint: Checkpoint
    adapters: tuple[AdapterFile, ...] = ()  # merged into the weights

    @property
    def label(self) -> str:
        """The base of file names: the hub id, or the name of the folder or file without its path."""
        if not os.path.exists(expanded(self.name)):
            return self.name
        return Path(os.path.abspath(self.checkpoint.path)).name.removesuffix(".safetensors")

    def load(self, part: str, dtype: torch.dtype | None = None) -> Model:
        """Load the network that a part is converted from, on the CPU, memory-mapped in the stored dtype.

        `dtype` converts it. Raises `CheckpointError` or `ConfigError`, which name the file and key.
        """
        model = self.checkpoint.load(NETWORK_OF[part], dtype)
        if self.adapters and NETWORK_OF[part] != "vae":
            wear(model, NETWORK_OF[part], self._worn, fused=True)
        return model

    def config(self, network: str) -> dict[str, Any]:
        """Return the config of a network, as in its JSON file."""
        return json.loads(json.dumps(self.checkpoint.config(network).to_dict()))

    def check(self) -> None:
        """Raise errors before any work starts: check each network's class, config and weight files."""
        found = {network: self.checkpoint.class_of(network) for network in NETWORK_OF.values()}
        if None in found.values() or self.checkpoint.class_of("text_encoder_2") is not None:
            raise ConfigError(
                f"{self.checkpoint.where}: only checkpoints with one text encoder can be converted, as in Stable "
                "Diffusion 1.x and 2.x; give such a checkpoint"
            )
        if found["vae"].__name__ != "AutoencoderKL":
            raise ConfigError(
                f"{self.checkpoint.where}: the vae is an AutoencoderTiny, which cannot be converted to Core ML; "
                "convert the checkpoint with its full autoencoder"
            )

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters and bytes of each network, from the headers."""
        return read_sizes(self.checkpoint)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer."""
        return self.checkpoint.load("tokenizer")

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The config of the checkpoint's own scheduler, including its class name."""
        scheduler = self.checkpoint.load("scheduler")
        return json.loads(json.dumps(scheduler.config.to_dict())) | {"_class_name": type(scheduler).__name__}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Steps and guidance scale that the checkpoint recommends, if any."""
        return dict(self.checkpoint.suggested)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash per network, independent of the dtype (pipelines/fingerprint.py)."""
        one_part_of = {network: part for part, network in NETWORK_OF.items()}
        return {network: fingerprint(self.load(part)) for network, part in one_part_of.items()}

    @cached_property
    def hash(self) -> str:
        """The hash of the whole checkpoint, as in recipes of images; with adapters, it includes theirs."""
        own = joined_hash(self.fingerprints)
        if not self.adapters:
            return own
        return hashlib.sha256(repr((own, [one.key for one in self._worn])).encode()).hexdigest()[:32]

    @cached_property
    def _worn(self) -> tuple[Worn, ...]:
        return read_adapters(self.adapters, {part: self.checkpoint.load(part) for part in ("unet", "text_encoder")})


def open_source(
    name: str | PathLike[str] = BUILT_IN,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    adapters: tuple[AdapterFile, ...] = (),
    **hub: Any,
) -> Source:
    """Open a checkpoint by folder, file, hub id or "built-in"; downloaded if necessary. Loads no weights.

    adapters: files to merge into the weights. Hub keywords: cache_dir, revision, token, local_files_only,
    force_download. Raises `CheckpointError` if it is missing or damaged, `ConfigError` if it cannot be converted.
    """
    source = Source(full_name(name), open_checkpoint(name, ComponentFiles(variant, use_safetensors), hub), adapters)
    source.check()
    return source
