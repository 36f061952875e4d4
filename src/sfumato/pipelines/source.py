"""The source of a pipeline's components, a folder or a file, behind one interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints.family import family_of, settings_of
from sfumato.checkpoints.locate import full_name, locate_folder
from sfumato.checkpoints.locate_file import is_single_file
from sfumato.checkpoints.single_file import SingleFile, open_single_file
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.checkpoints.weights import find_weights, read_headers
from sfumato.configs import one_of, parse
from sfumato.errors import CheckpointError, ConfigError, UsageError, VariantError
from sfumato.files import read_json
from sfumato.models import CLIPTextModelWithProjection
from sfumato.models.base import Model
from sfumato.pipelines.components import (
    COMPONENTS,
    FLAGS,
    INDEX,
    REQUIRED,
    WITH_WEIGHTS,
    ComponentFiles,
    check_component,
    class_of_file,
    component_class,
    network_class,
    read_index,
)
from sfumato.pipelines.words import Words
from sfumato.runtime.choices import NETWORKS, Part, count_parameters
from sfumato.text.tokenizer import CLIPTokenizer, prompt_tokens
from sfumato.text.vocabulary import clip_tokenizer

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.families import Family

__all__ = ["FILE_OPTIONS", "Folder", "OneFile", "OneNetwork", "Source", "load_components", "open_source", "stored_size"]

log = logging.getLogger("sfumato")

# Options for opening a single-file checkpoint (checkpoints/single_file.py).
FILE_OPTIONS = ("family", "prediction_type", "config", "original_config", "ema")
# One precision for all components, or by role with a "default"; None for the stored precision.
Dtypes = torch.dtype | Mapping[str, torch.dtype] | None


@dataclass(frozen=True)
class Folder:
    """A checkpoint in a folder on this machine. name: as given by the user; files: which weight files to use."""

    path: Path
    name: str
    files: ComponentFiles = field(default_factory=ComponentFiles)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The contents of `model_index.json`."""
        return read_index(self.path)

    @property
    def where(self) -> Path:
        """The file that lists its components."""
        return self.path / INDEX

    @property
    def class_name(self) -> str:
        """The name of its pipeline class."""
        return str(self.index.get("_class_name"))

    @property
    def flags(self) -> dict[str, Any]:
        """The family settings in its index."""
        return {flag: self.index.get(flag) for flag in FLAGS}

    @property
    def has_safety_checker(self) -> bool:
        """Whether it contains a safety checker, which is not loaded."""
        return bool((self.index.get("safety_checker") or [None])[0])

    @property
    def family(self) -> Family:
        """The checkpoint's family."""
        return family_of(self.path)

    @property
    def suggested(self) -> dict[str, Any]:
        """The checkpoint's own default settings, as fields of a `GenerateRequest`."""
        return suggested_settings(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """The default settings for requests: the checkpoint's own, or else its family's."""
        return settings_of(self.family) | self.suggested

    @property
    def words(self) -> Words | None:
        """The vocabulary of a small model; None for others."""
        return Words.from_folder(self.path)

    @property
    def tokens(self) -> int:
        """The maximum number of tokens of a prompt."""
        return prompt_tokens(self.path)

    @property
    def options(self) -> dict[str, Any]:
        """The options it was opened with: none."""
        return {}

    def class_of(self, part: str) -> Any:
        """Return our class of a component; None if it is missing. Raises `CheckpointError` or `ConfigError`."""
        return component_class(self.path, self.index, part)

    def config(self, role: str) -> Any:
        """Return the config of a network."""
        path = self.path / role / "config.json"
        return parse(self.class_of(role).config_class, read_json(path), path)[0]

    def size(self, role: str) -> Part:
        """Return the parameters and bytes of a network, from headers; for pickled weights, from config and files."""
        cls, files = self.class_of(role), self._weights(role)
        if self.files.use_safetensors is False:
            numbers = count_parameters(self.config(role), projected=issubclass(cls, CLIPTextModelWithProjection))
            return Part(numbers, sum(file.stat().st_size for file in files))
        return stored_size(files)

    def load(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """Load a component as our class. dtype: the precision of its weights; None for the stored one."""
        cls = self.class_of(part)
        if issubclass(cls, WITH_WEIGHTS):
            named: dict[str, Any] = {"variant": self.files.variant, "use_safetensors": self.files.use_safetensors}
            return cls.from_folder(self.path / part, dtype=dtype, **named, **self.files.how(part))
        if issubclass(cls, CLIPTokenizer):
            return cls.from_folder(self.path / part)
        return cls.from_pretrained(self.path, subfolder=part)

    def check(self, given: Mapping[str, Any]) -> list[str]:
        """Return the networks that lack the requested variant and use their plain weights instead.

        given: components not loaded from here. Raises `VariantError` if no network has the variant.
        """
        variant = self.files.variant
        if variant is None:
            return []
        roles = [role for roles in NETWORKS.values() for role in roles]
        parts = [role for role in roles if role not in given and (role in REQUIRED or (self.path / role).is_dir())]
        plain = [part for part in parts if not any(f".{variant}" in path.name for path in self._weights(part))]
        if plain and len(plain) == len(parts):
            raise VariantError(f"{self.path} has no variant {variant!r}; omit variant to use the plain weights")
        return plain

    def _weights(self, role: str) -> list[Path]:
        options = {"variant": self.files.variant, "use_safetensors": self.files.use_safetensors}
        return find_weights(self.path / role, network_class(role).weights_name, **options)


@dataclass(frozen=True)
class OneFile:
    """A single-file checkpoint. Components that it lacks may be in the folder that supplies its configs."""

    file: SingleFile
    name: str
    files: ComponentFiles = field(default_factory=ComponentFiles)
    flags = dict.fromkeys(FLAGS)
    suggested: Mapping[str, Any] = field(default_factory=dict)
    words = None
    has_safety_checker = False

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @property
    def where(self) -> Path:
        """The path of the file, for error messages."""
        return self.path

    @property
    def class_name(self) -> str:
        """The name of its pipeline class."""
        return self.family.pipeline

    @property
    def family(self) -> Family:
        """The checkpoint's family, with the number of steps from its name."""
        return replace(self.file.detected.family, steps=self.file.detected.steps)

    @property
    def settings(self) -> dict[str, Any]:
        """The default settings for requests."""
        return settings_of(self.family)

    @property
    def tokens(self) -> int:
        """The maximum number of tokens of a prompt."""
        there = [role for role in ("tokenizer", "tokenizer_2") if self._beside(role)]
        return 77 if self.file.folder is None or not there else prompt_tokens(self.file.folder)

    @property
    def options(self) -> dict[str, Any]:
        """The options it was opened with, for recipes."""
        return dict(self.file.options)

    def class_of(self, part: str) -> Any:
        """Return our class of a component; None if its family does not have it."""
        return class_of_file(self.file.detected.family, self.file.detected.scheduler, part)

    def config(self, role: str) -> Any:
        """Return the config of a network. Raises `CheckpointError` if it is missing."""
        folder = self._instead(role)
        if folder is not None:
            return folder.config(role)
        return parse(self.class_of(role).config_class, self.file.config(role), self.path)[0]

    def size(self, role: str) -> Part:
        """Return the parameters and bytes of a network, from headers."""
        folder = self._instead(role)
        if folder is not None:
            return folder.size(role)
        part = self.file.part(role)
        return Part(part.parameters, part.bytes)

    def load(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """Load a component as our class. dtype: the precision of its weights; None for the most frequent stored one."""
        cls, folder = self.class_of(part), self._instead(part)
        if folder is not None:
            return folder.load(part, dtype)
        if issubclass(cls, Model):
            return cls.from_file(self.file, dtype=dtype, **self.files.how(part))
        if issubclass(cls, CLIPTokenizer):
            encoders = self.file.detected.family.encoders
            role = part.replace("tokenizer", "text_encoder")
            return clip_tokenizer(next(one.pad for one in encoders if one.role == role))
        return cls.from_config(self.file.detected.scheduler)

    def check(self, given: Mapping[str, Any]) -> list[str]:
        """Raise `CheckpointError` if components are neither in the file, nor in `given`, nor in the config folder."""
        missing = self.file.missing
        lacking = [role for role in missing if role not in given and self._instead(role) is None]
        if lacking:
            more = f"; it also lacks {' and '.join(lacking[1:])}" if lacking[1:] else ""
            raise CheckpointError(f"{self.path}: {missing[lacking[0]]}{more}")
        return []

    def _instead(self, part: str) -> Folder | None:
        """Return the folder that supplies a component; None if the component is in the file or nowhere."""
        if self.file.folder is None or not self._beside(part):
            return None
        wanted = part.startswith("tokenizer") or part in self.file.missing
        files = replace(self.files, use_safetensors=None)
        return Folder(self.file.folder, self.file.folder.name, files) if wanted else None

    def _beside(self, part: str) -> bool:
        wanted = ("merges.txt", "tokenizer.json") if part.startswith("tokenizer") else ("*.safetensors*",)
        folder = self.file.folder
        return folder is not None and any(any((folder / part).glob(pattern)) for pattern in wanted)


Source = Folder | OneFile


@dataclass(frozen=True)
class OneNetwork:
    """The source of one network: a folder, or a single file whose header has been read."""

    place: Path
    cls: Any
    file: SingleFile | None = None

    @classmethod
    def in_folder(
        cls, folder: Path, classes: Mapping[str, Any], name: str, what: str, *, whole: str, other: str
    ) -> OneNetwork:
        """Return the network in a folder. name: what the user called it; what: such as "a ControlNet".

        Raises `CheckpointError` if it is a whole checkpoint or of another class; whole, other: what to give instead.
        """
        if (folder / "model_index.json").is_file():
            raise CheckpointError(f"{name} is a whole checkpoint, not {what}; {whole}")
        found = str(read_json(folder / "config.json").get("_class_name"))
        if found not in classes:
            raise CheckpointError(f"{name} is a {found}, not {what}; {other}")
        return cls(folder, classes[found])

    @property
    def config(self) -> Any:
        """The network's config."""
        if self.file is not None:
            return parse(self.cls.config_class, self.file.config(self.cls.role), self.place)[0]
        path = self.place / "config.json"
        return parse(self.cls.config_class, read_json(path), path)[0]

    @property
    def size(self) -> Part:
        """The network's parameters and bytes, from headers."""
        if self.file is not None:
            part = self.file.part(self.cls.role)
            return Part(part.parameters, part.bytes)
        return stored_size(find_weights(self.place, self.cls.weights_name))

    def load(self, dtype: torch.dtype, *, later: bool = False) -> Any:
        """Load the network onto the CPU. later: leave its weights on the meta device, for `reload` to load."""
        if self.file is not None:
            return self.cls.from_file(self.file, dtype=dtype, later=later)
        return self.cls.from_folder(self.place, dtype=dtype, later=later)


def open_source(
    name: str | PathLike[str] | Source,
    files: ComponentFiles,
    hub: Mapping[str, Any],
    *,
    given: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """Find a checkpoint by folder, file, hub id, or URL of a file on the hub. Downloads it if necessary.

    Reads no weights. given: components not loaded from it; options: for a file, by the names of `FILE_OPTIONS`. Raises
    `CheckpointError`, `DownloadError` or `UsageError`.
    """
    given, options = given or {}, {key: value for key, value in (options or {}).items() if value not in (None, False)}
    if isinstance(name, (Folder, OneFile)):
        return name
    if is_single_file(name):
        if files.variant is not None:
            raise UsageError(f"{name} is a single file, which has no variants; omit variant")
        file = open_single_file(name, use_safetensors=files.use_safetensors, **options, **hub)
        source = OneFile(file, str(name), files)
        source.check(given)
        return source
    if options:
        raise UsageError(f"{next(iter(options))} applies only to single files, and {name} is not one; omit it")
    folder = locate_folder(name, lambda names, strict: files.select(names, strict, tuple(given)), **hub)
    return Folder(folder, full_name(name), files)


def stored_size(files: Sequence[Path]) -> Part:
    """Parameters and bytes in safetensors files, from their headers."""
    headers = read_headers(files).values()
    return Part(sum(header.count for header in headers), sum(header.bytes for header in headers))


def load_components(source: Source, dtypes: Dtypes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Load every component that is not in `given`.

    Raises `CheckpointError` or `ConfigError`, which name the file and key.
    """
    if plain := source.check(given):
        log.warning("no %r variant of %s; using the plain weights instead", source.files.variant, ", ".join(plain))
    loaded: dict[str, Any] = {}
    for part in COMPONENTS:
        if part in given:
            if given[part] is not None:
                check_component(part, given[part])
            loaded[part] = given[part]
        elif source.class_of(part) is not None:
            loaded[part] = source.load(part, _dtype_of(part, dtypes))
    _check_together(source.path, loaded)
    return loaded


def _check_together(path: Path, loaded: Mapping[str, Any]) -> None:
    """Raise `ConfigError` or `CheckpointError` if two components do not fit each other."""
    if loaded["unet"] is None or loaded["vae"] is None:
        return
    unet, vae = loaded["unet"].config, loaded["vae"].config
    roles = [role for role in ("text_encoder", "text_encoder_2") if loaded.get(role) is not None]
    width = sum(loaded[role].config.hidden_size for role in roles)
    wide = zip(unet.per_block("cross_attention_dim"), unet.down_block_types, strict=True)
    ready = not roles or None in loaded.values()  # callers without an encoder pass embeddings
    for crossed in (crossed for crossed, kind in wide if "CrossAttn" in kind):
        if crossed != width and not ready:
            raise ConfigError(
                f"{path}: unet/config.json has cross_attention_dim = {crossed}, {' and '.join(roles)}/config.json "
                f"hidden_size = {width}; they belong to different checkpoints"
            )
    if unet.out_channels not in (vae.latent_channels, 2 * vae.latent_channels, vae.latent_channels + unet.is_k):
        raise ConfigError(
            f"{path}: unet/config.json has out_channels = {unet.out_channels}, vae/config.json latent_channels = "
            f"{vae.latent_channels}; they belong to different checkpoints"
        )
    one_of(str(path / "vae" / "config.json"), "out_channels", vae.out_channels, (1, 3, 4))
    for role in roles:
        tokenizer, words = loaded.get(role.replace("text_encoder", "tokenizer")), loaded[role].config.vocab_size
        if tokenizer is not None and tokenizer.largest_id >= words:
            raise CheckpointError(
                f"{path / role.replace('text_encoder', 'tokenizer')} has token ids up to {tokenizer.largest_id}, but "
                f"the text encoder has only {words}; they belong to different checkpoints"
            )


def _dtype_of(part: str, dtypes: Dtypes) -> torch.dtype | None:
    if isinstance(dtypes, Mapping):
        return dtypes.get(part, dtypes.get("default", torch.float32))
    return dtypes
