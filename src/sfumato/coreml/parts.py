"""The parts of a pipeline from a folder of converted models, by their metadata or by their checkpoint.

Models that Sfumato converted contain their config, scheduler and settings (metadata "sfumato.…"). Models published by
Apple and others do not; for these, the small files of a checkpoint are read, but never its weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sfumato import schedulers
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.suggested import SETTINGS
from sfumato.configs import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig, parse
from sfumato.coreml.backends import Chain, Link
from sfumato.coreml.formats import read_model
from sfumato.coreml.layout import find_models
from sfumato.coreml.networks import ConvertedAutoencoder, ConvertedTextEncoder, ConvertedUNet, sides
from sfumato.coreml.roles import INPUTS
from sfumato.errors import CheckpointError, ConfigError, DownloadError
from sfumato.files import read_json
from sfumato.schedulers.names import NAMES
from sfumato.text.tokenizer import CLIPTokenizer, select_tokenizer_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sfumato.checkpoints.locate import Select
    from sfumato.configs import Config
    from sfumato.coreml.backends import Engine
    from sfumato.coreml.layout import Models
    from sfumato.coreml.program import Model
    from sfumato.schedulers.base import Scheduler

__all__ = ["DEFAULT_VERSION", "ConvertedParts", "open_parts", "small_files"]

log = logging.getLogger("sfumato")

# The checkpoint that Apple's runner assumes for models that do not name one.
DEFAULT_VERSION = "CompVis/stable-diffusion-v1-4"

SMALL_FILES = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
# The blocks of a weight file that identify it, spread over the whole file.
BLOCKS, BLOCK_BYTES = 64, 4096


def open_parts(
    folder: Path,
    engine: Engine,
    model_version: str | None = None,
    *,
    kind: str | None = None,
    local_files_only: bool = False,
) -> ConvertedParts:
    """Find the models in a folder, or below it, and read their metadata; no model is loaded yet.

    model_version: the checkpoint they were made from, if they do not name it; a folder or a hub id. kind: "packages" or
    "compiled", if there are both. local_files_only: never download the small files of that checkpoint; those of a
    checkpoint that only the models name are never downloaded. Raises `CheckpointError`, `ConfigError` or `UsageError`.
    """
    return ConvertedParts(find_models(folder, kind=kind), engine, model_version, local_files_only)


def small_files(name: str) -> Select:
    """Return a filter that selects a checkpoint's config and tokenizer files, not its weights; `name` is for errors."""

    def select(names: Sequence[str], strict: bool) -> list[str]:
        missing = [file for file in SMALL_FILES if file not in names]
        if missing:
            raise CheckpointError(
                f"{name} has no {missing[0]}, so it is not a Stable Diffusion checkpoint; use another"
            )
        return [*SMALL_FILES, *select_tokenizer_files(names, "tokenizer")]

    return select


@dataclass(frozen=True)
class ConvertedParts:
    """The parts of a pipeline: converted networks, the tokenizer and the scheduler."""

    found: Models
    engine: Engine
    model_version: str | None = None
    local_files_only: bool = False

    @cached_property
    def text_encoder(self) -> ConvertedTextEncoder:
        """The text encoder."""
        path = self.found.text_encoder
        config = self._config(CLIPTextConfig, "text_encoder", path)
        network = ConvertedTextEncoder(config, self._chain(path))
        tokens = sides(network.chain, "input_ids")[1]
        network.config = config.replace(max_position_embeddings=tokens)
        network.fingerprint = self._fingerprint("text_encoder", [path])
        return network

    @cached_property
    def unet(self) -> ConvertedUNet:
        """The U-Net. Raises `ConfigError` if it has more inputs, `CheckpointError` if it does not fit its config."""
        paths = self.found.unet
        config = self._config(UNet2DConditionConfig, "unet", paths[-1])
        network = ConvertedUNet(config, self._chain(*paths))
        names = {feature.name for feature in network.chain.interface.inputs}
        if surplus := sorted(names - INPUTS["unet"]):
            kind = "Stable Diffusion XL" if {"time_ids", "text_embeds"} & names else "ControlNet or another kind"
            raise ConfigError(
                f"{paths[0].name} also reads {', '.join(surplus)}, like models of {kind}; only Stable "
                "Diffusion 1.x and 2.x are supported"
            )
        self._check_fit(paths[0], "latent channels", sides(network.chain, "sample")[1], config.in_channels)
        read = config.per_block("cross_attention_dim")[0]
        self._check_fit(paths[0], "values per token", sides(network.chain, "encoder_hidden_states")[1], read)
        network.config = config.replace(sample_size=network.latent_size)
        network.fingerprint = self._fingerprint("unet", paths)
        return network

    @cached_property
    def vae(self) -> ConvertedAutoencoder:
        """The VAE. Raises `CheckpointError` if it does not fit its config and the U-Net's size."""
        path, other = self.found.vae_decoder, self.found.vae_encoder
        config = self._config(AutoencoderKLConfig, "vae", path)
        network = ConvertedAutoencoder(config, self._chain(path), None if other is None else self._chain(other))
        self._check_fit(path, "latent channels", sides(network.decoding, "z")[1], config.latent_channels)
        if other is not None and network.encoding is not None:
            shape = (config.in_channels, *(side * config.scale_factor for side in self.unet.latent_size))
            for what, has, wanted in zip(
                ("channels", "rows", "columns"), sides(network.encoding, "x")[1:], shape, strict=True
            ):
                self._check_fit(other, f"{what} of pixels", has, wanted)
        network.fingerprint = self._fingerprint("vae", [path])
        return network

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer next to the models, or the checkpoint's, with the text encoder's length."""
        said = self._json("sfumato.tokenizer", self.found.text_encoder) or {}
        if self.found.tokenizer is not None:
            tokenizer = CLIPTokenizer.from_folder(self.found.tokenizer, pad_token_id=said.get("pad_token_id"))
        else:
            tokenizer = CLIPTokenizer.from_folder(self._checkpoint / "tokenizer")
        tokenizer.model_max_length = self.text_encoder.config.max_position_embeddings
        return tokenizer

    @cached_property
    def scheduler(self) -> Scheduler:
        """The checkpoint's own scheduler. Raises `ConfigError` if there is no such scheduler."""
        path = self.found.unet[-1]
        config = self._json("sfumato.scheduler", path)
        where = f"{path.name} (sfumato.scheduler)"
        if config is None:
            file = self._checkpoint / "scheduler" / "scheduler_config.json"
            config, where = read_json(file), str(file)
        name = config.get("_class_name")
        if name not in {alias.class_name for alias in NAMES.values()}:
            raise ConfigError(f"{where}: there is no scheduler {name!r}; 'sfumato schedulers' lists all of them")
        return getattr(schedulers, name).from_config(config)

    @cached_property
    def suggested(self) -> dict[str, Any]:
        """Steps and guidance scale that the checkpoint recommends, if any."""
        settings = self._json("sfumato.settings", self.found.unet[-1]) or {}
        return {name: settings[name] for name in SETTINGS if name in settings}

    @cached_property
    def details(self) -> dict[str, Any]:
        """What a recipe records about the models in addition to their name."""
        said = self._read[self.found.unet[-1]].metadata
        named = {"model_version": self.model_version, "attention": said.get("sfumato.attention")}
        named |= {"bits": said.get("sfumato.bits"), "compute_unit": self.engine.compute_unit}
        return {
            "engine": self.engine.name,
            "kind": self.found.kind,
            **{key: value for key, value in named.items() if value is not None},
        }

    @cached_property
    def _read(self) -> dict[Path, Model]:
        """All models by path, without their weights."""
        found = self.found
        paths = [
            found.text_encoder,
            *found.unet,
            found.vae_decoder,
            *([found.vae_encoder] if found.vae_encoder else []),
        ]
        return {path: read_model(path) for path in paths}

    def _chain(self, *paths: Path) -> Chain:
        models = [(path, self._read[path]) for path in paths]
        return Chain(
            [
                Link(model.interface, lambda path=path, model=model: self.engine.open(path, model))
                for path, model in models
            ]
        )

    def _config(self, cls: type[Config], network: str, path: Path) -> Any:
        mapping = self._json("sfumato.config", path)
        if mapping is None:
            mapping = read_json(self._checkpoint / network / "config.json")
        return parse(cls, mapping)[0]

    def _json(self, key: str, path: Path) -> dict[str, Any] | None:
        """Return an entry of a model's metadata, or None. Raises `CheckpointError` if it is not a JSON object."""
        text = self._read[path].metadata.get(key)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its metadata {key!r} is invalid JSON ({error}); convert it again"
            ) from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: its metadata {key!r} must be a JSON object; convert it again")
        return value

    @cached_property
    def _checkpoint(self) -> Path:
        """The folder of the models' checkpoint, which is located only if their metadata is incomplete."""
        told = self._read[self.found.unet[-1]].metadata.get("sfumato.source")
        name = self.model_version or told or DEFAULT_VERSION
        if self.model_version is None and told is None:
            log.warning(
                "these models do not name their checkpoint; assuming %s, like Apple's runner; "
                "give another with --model-version",
                name,
            )
        # Never download something only because a file names it.
        only_told = self.model_version is None and told is not None
        try:
            return locate_folder(name, small_files(name), local_files_only=self.local_files_only or only_told)
        except (CheckpointError, DownloadError) as error:
            if not only_told:
                raise
            raise CheckpointError(
                f"these models were made from {name}, which is not on this machine; to download it, "
                f"name it: --model-version {name}"
            ) from error

    def _check_fit(self, path: Path, what: str, has: int, wanted: int) -> None:
        if has != wanted:
            raise CheckpointError(
                f"{path.name} has {has} {what}, but its checkpoint's config says {wanted}; give the checkpoint "
                "it was made from with --model-version"
            )

    def _fingerprint(self, network: str, paths: Sequence[Path]) -> str:
        """Return the hash that identifies these weights in recipes.

        It covers the checkpoint's hash and the bits or, if unknown, blocks of the weight files.
        """
        digest = hashlib.sha256(network.encode())
        said = self._read[paths[0]].metadata
        if "sfumato.source_hash" in said:
            digest.update(f"{said['sfumato.source_hash']} {said.get('sfumato.bits', 16)}".encode())
            return digest.hexdigest()[:32]
        for path in paths:
            for file in sorted(path.rglob("*.bin")):
                if file.parent.name == "weights" and file.is_file():
                    _sample(file, digest)
        return digest.hexdigest()[:32]


def _sample(file: Path, digest: Any) -> None:
    """Update a hash with a file's size and with blocks spread over the file."""
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as stream:
        for block in range(BLOCKS):
            stream.seek(size * block // BLOCKS)
            digest.update(stream.read(BLOCK_BYTES))
