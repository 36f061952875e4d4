"""Converts a checkpoint to Core ML packages: checked up front, written atomically, resumed after an interruption."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from sfumato import __version__
from sfumato.coreml import layout
from sfumato.coreml.chunk import MAX_CHUNKS, chunk, join
from sfumato.coreml.converter import (
    DEFAULT_TARGET,
    attention_named,
    target_named,
    text_encoder,
    unet,
    vae_decoder,
    vae_encoder,
)
from sfumato.coreml.formats import is_model, read_model, write_package
from sfumato.coreml.palettize import BITS, palettize, recipe_for, weights_of
from sfumato.coreml.roles import PARTS, look
from sfumato.coreml.source import NETWORK_OF
from sfumato.errors import ConfigError, MemoryPlanError, OutputError, SfumatoError, UsageError, suggest
from sfumato.files import check_writable, output_folder
from sfumato.leftovers import sweep
from sfumato.runtime.facts import read_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sfumato.coreml.program import Model
    from sfumato.coreml.source import Source

__all__ = ["Conversion", "ConversionOptions", "Converted", "build", "convert", "memory_needed", "metadata_for"]

log = logging.getLogger("sfumato")

# Parts that can be palettized, as in Apple's converter: the VAE has few weights, and its errors are visible.
PALETTIZED = ("text_encoder", "unet")
# Latents of this size are images of 4,096 pixels, whose attention fits no device's memory.
MAX_SIDE = 512
# Measured memory of a process that has loaded torch and converted nothing yet (docs/performance.md).
BASE_BYTES = 0.6 * 2**30


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of a conversion.

    parts      any of `PARTS`
    attention  "original" (CPU and GPU), "split_einsum" or "split_einsum_v2" (Neural Engine)
    height, width   of the latents; None for the checkpoint's own
    target     the oldest system to support, in Apple's notation: "macOS13", "iOS17", …
    bits       bits per weight of text encoder and U-Net: 1, 2, 4, 6 or 8; None for 16 bits without palettes
    target_db  instead of bits: for each layer, the fewest bits that keep this signal-to-noise ratio of its weights
    recipe     instead of both: bits by weight name
    chunks     the number of packages that the U-Net is split into
    merged     write the chunks as one package, a pipeline that runs them in sequence
    batch      the U-Net's batch size: 2 for guidance in one call, or 1

    Raises `UsageError` if an option is invalid.
    """

    parts: tuple[str, ...] = PARTS
    attention: str = "split_einsum"
    height: int | None = None
    width: int | None = None
    target: str = DEFAULT_TARGET
    bits: int | None = None
    target_db: float | None = None
    recipe: Mapping[str, int] | None = None
    chunks: int = 1
    merged: bool = False
    batch: int = 2

    def __post_init__(self) -> None:
        for name in ("height", "width", "bits", "chunks", "batch"):
            number = getattr(self, name)
            given = number is not None or name in ("chunks", "batch")
            if given and (isinstance(number, bool) or not isinstance(number, int)):
                raise UsageError(f"{name} must be a whole number, not {number!r}")
        if isinstance(self.target_db, (bool, str)):
            raise UsageError(f"the target accuracy must be a positive number of dB, not {self.target_db!r}")
        if not self.parts:
            raise UsageError(f"there is nothing to convert; parts are {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"there is no part {part!r}{suggest(part, PARTS)}; parts are {', '.join(PARTS)}")
        attention_named(self.attention)
        target_named(self.target)
        if self.bits is not None and self.bits not in BITS:
            raise UsageError(f"weights can have 1, 2, 4, 6 or 8 bits, not {self.bits}; 16 means no palettes")
        if self.target_db is not None and not 0 < self.target_db < math.inf:
            raise UsageError(f"the target accuracy must be a positive number of dB, not {self.target_db}")
        if sum(value is not None for value in (self.bits, self.target_db, self.recipe)) > 1:
            raise UsageError("bits, a target in dB and a recipe cannot be combined; pass one of them")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise UsageError(f"the latents' {name} must be 1 to {MAX_SIDE}, not {side}")
        if not 1 <= self.chunks <= MAX_CHUNKS:
            raise UsageError(f"the U-Net can be split into 1 to {MAX_CHUNKS} chunks, not {self.chunks}")
        if self.merged and self.chunks == 1:
            raise UsageError("there are no chunks to merge; split the U-Net too (--chunk-unet)")
        if self.batch not in (1, 2):
            raise UsageError(f"the U-Net can read 1 or 2 prompts at once, not {self.batch}")

    @property
    def compressed(self) -> bool:
        """Whether some weights are palettized."""
        return self.bits is not None or self.target_db is not None or self.recipe is not None


@dataclass(frozen=True)
class Converted:
    """One converted part: its packages, size in bytes and seconds. kept: an existing, identical package was reused."""

    part: str
    paths: tuple[Path, ...]
    bytes: int
    seconds: float
    kept: bool = False


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: the folder, and its parts in the order of conversion."""

    folder: Path
    parts: tuple[Converted, ...] = field(default=())


def convert(
    source: Source,
    folder: Path,
    options: ConversionOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_part: Callable[[str], None] | None = None,
) -> Conversion:
    """Convert a checkpoint to packages in a folder, under the file names that Apple's runners expect.

    resume: keep existing packages that match the options, and replace others; overwrite: replace all; without either,
    an existing package raises an error before any work starts. `on_part` is called with each part before its
    conversion. Raises `ConfigError` if the checkpoint cannot be converted, `OutputError` if there is not enough disk
    space, `MemoryPlanError` if there is not enough memory, `UsageError` if options do not fit the checkpoint. Each
    package is written completely or not at all.
    """
    options = options or ConversionOptions()
    paths = {part: _paths(folder, source.label, part, options) for part in options.parts}
    _check_place(source, folder, paths, free=resume or overwrite)
    _check_room(source, folder, options)
    for path in chain.from_iterable(paths.values()):
        sweep(path)
    made = []
    for part in options.parts:
        if on_part is not None:
            on_part(part)
        began = time.perf_counter()
        recipe = _recipe(source, part, options)
        kept = resume and all(_is_made_by(path, recipe) for path in paths[part])
        if not kept:
            _write(source, part, options, recipe, paths[part])
        layout.remove_stale(_stale(folder, source.label, part, paths[part]))
        size = sum(layout.folder_bytes(path) for path in paths[part])
        made.append(Converted(part, paths[part], size, time.perf_counter() - began, kept))
    _write_tokenizer(source, folder)
    return Conversion(folder, tuple(made))


def memory_needed(source: Source, options: ConversionOptions) -> int:
    """Return the peak memory of a conversion in bytes, estimated from the headers.

    Weights are memory-mapped and cast one by one, so the largest tensor in float32 counts, twice, and the palette
    indices of one network.
    """
    networks = {NETWORK_OF[part] for part in options.parts}
    largest = max(getattr(source.sizes, network).parameters for network in networks)
    tensor = max(source.sizes.text_encoder_config.vocab_size * source.sizes.text_encoder_config.hidden_size, 3 * 10**7)
    return int(BASE_BYTES + 8 * tensor + (largest if options.compressed else 0))


def build(source: Source, part: str, options: ConversionOptions) -> Model:
    """Return one part as a float16 model, not split or compressed; its weights are loaded lazily."""
    network: Any = source.load(part)
    common = {"target": options.target, "dtype": "fp16"}
    if part == "text_encoder":
        return text_encoder(network, **common)
    height, width = _latent_size(source, options)
    if part == "unet":
        tokens = min(source.tokenizer.model_max_length, source.sizes.text_encoder_config.max_position_embeddings)
        return unet(
            network,
            height=height,
            width=width,
            tokens=tokens,
            batch=options.batch,
            attention=options.attention,
            **common,
        )
    build = vae_decoder if part == "vae_decoder" else vae_encoder
    return build(network, height=height, width=width, **common)


def _write(source: Source, part: str, options: ConversionOptions, recipe: str, paths: Sequence[Path]) -> None:
    model = build(source, part, options)
    if part in PALETTIZED and options.compressed:
        model = palettize(model, _bits(model, options))
    models = chunk(model, options.chunks) if part == "unet" and options.chunks > 1 else [model]
    if options.merged and len(models) > 1:
        models = [replace(join(models), description=model.description)]
    shared = metadata_for(source, part, options) | {"sfumato.recipe": recipe}
    for number, (one, path) in enumerate(zip(models, paths, strict=True), start=1):
        own = {} if len(paths) == 1 else {"sfumato.chunk": f"{number} of {len(paths)}"}
        about = one.description or part
        described = replace(
            one,
            metadata={**one.metadata, **shared, **own},
            author=f"converted by Sfumato from {source.label}",
            license="that of the checkpoint; see its model card",
            version=__version__,
            description=about if len(paths) == 1 else f"{about}, chunk {number} of {len(paths)}",
        )
        write_package(described, path)


def _bits(model: Model, options: ConversionOptions) -> int | dict[str, int]:
    if options.bits is not None:
        return options.bits
    if options.recipe is not None:
        return {name: bits for name, bits in options.recipe.items() if name in weights_of(model)}
    return recipe_for(model, options.target_db or 0)


def _check_recipe(source: Source, options: ConversionOptions) -> None:
    """Raise `UsageError` if the recipe names a weight that is in none of the palettized parts."""
    if options.recipe is None:
        return
    known = {name for part in PALETTIZED if part in options.parts for name in weights_of(build(source, part, options))}
    for name in options.recipe:
        if name not in known:
            raise UsageError(
                f"the recipe names {name!r}, which is not a weight of these networks{suggest(name, known)}"
            )


def _latent_size(source: Source, options: ConversionOptions) -> tuple[int, int]:
    height, width = source.sizes.unet_config.latent_size
    return options.height or height, options.width or width


def metadata_for(source: Source, part: str, options: ConversionOptions) -> dict[str, str]:
    """Return the metadata of a part's models, with keys "sfumato.…": everything that a runner needs to know."""
    vae = source.sizes.vae_config
    values: dict[str, Any] = {
        "part": part,
        "config": source.config(NETWORK_OF[part]),
        "source": source.name,
        "source_hash": source.hash,
        "version": __version__,
    }
    if part == "unet":
        values |= {
            "attention": options.attention,
            "scheduler": source.scheduler,
            "prediction_type": source.scheduler["prediction_type"],
            "settings": source.settings,
        }
    if part == "text_encoder":
        tokenizer = source.tokenizer
        values["tokenizer"] = {"model_max_length": tokenizer.model_max_length, "pad_token_id": tokenizer.pad_token_id}
    if part.startswith("vae"):
        values |= {"scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor or 0.0}
    if part in PALETTIZED and options.compressed:
        values["bits"] = options.bits or "mixed"
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in values.items()
    }
    return {f"sfumato.{key}": text for key, text in texts.items()}


def _recipe(source: Source, part: str, options: ConversionOptions) -> str:
    """Return everything that the bytes of a part depend on, as JSON."""
    values: dict[str, Any] = {
        "version": __version__,
        "weights": source.fingerprints[NETWORK_OF[part]],
        "source": source.hash,
        "target": options.target,
    }
    if part != "text_encoder":
        values["latents"] = _latent_size(source, options)
    if part == "unet":
        values |= {"attention": options.attention, "batch": options.batch, "chunks": options.chunks}
        values |= {"merged": options.merged}
    if part in PALETTIZED and options.compressed:
        values |= {"bits": options.bits, "target_db": options.target_db, "recipe": dict(options.recipe or {})}
    return json.dumps(values, sort_keys=True)


def _paths(folder: Path, name: str, part: str, options: ConversionOptions) -> tuple[Path, ...]:
    chunks = options.chunks if part == "unet" and not options.merged else 1
    return tuple(folder / name for name in layout.package_names(name, part, chunks))


def _stale(folder: Path, name: str, part: str, paths: Sequence[Path]) -> list[Path]:
    return layout.stale(folder, {path.name for path in paths}, partial(layout.package_names, name, part))


def _is_made_by(path: Path, recipe: str) -> bool:
    if not path.exists():
        return False
    try:
        return read_model(path).metadata.get("sfumato.recipe") == recipe
    except SfumatoError as error:
        log.warning("%s is converted again: %s", path.name, error)
        return False


def _check_place(source: Source, folder: Path, paths: Mapping[str, Sequence[Path]], *, free: bool) -> None:
    """Raise unless all packages can be written to the folder and form one set with the packages that stay there."""
    check_writable(folder)
    try:
        if folder.suffix in layout.KINDS.values() or is_model(folder):
            raise UsageError(
                f"{folder} is the name of a single model; give a folder for all packages, such as -o packages"
            )
        stale = [path for part in paths for path in _stale(folder, source.label, part, paths[part])]
        ours = [path for part in paths.values() for path in part]
        present = [path for path in (*ours, *stale) if path.exists()]
        others = [path for path in sorted(folder.glob("*.mlpackage")) if path not in present]
    except OSError as error:
        raise OutputError(f"packages cannot be written into {folder} ({error.strerror}); choose another") from error
    if present and not free:
        raise UsageError(f"{present[0]} already exists; use --resume to keep finished packages, or --overwrite")
    for other in map(look, others):
        if other.part in paths or other.source_hash not in ("", source.hash):
            raise UsageError(f"{other.path} is from a conversion with other options; choose another folder with -o")


def _check_room(source: Source, folder: Path, options: ConversionOptions) -> None:
    """Raise before anything is written if the conversion cannot succeed."""
    _check_latents(source, options)
    _check_recipe(source, options)
    size = sum(2 * getattr(source.sizes, NETWORK_OF[part]).parameters for part in options.parts)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_disk = shutil.disk_usage(nearest).free
    if free_disk < size:
        raise OutputError(
            f"the packages need up to {size / 1e6:,.0f} MB and {nearest} has {free_disk / 1e6:,.0f} MB free; "
            "free some space, or choose another folder with -o"
        )
    needed, free = memory_needed(source, options), read_facts("cpu").memory_free
    if free < needed:
        raise MemoryPlanError(
            f"this conversion needs {needed / 1e6:,.0f} MB of memory, but only {free / 1e6:,.0f} MB are free; close "
            f"other programs{', or convert without palettes' if options.compressed else ''}",
            needed=needed,
            free=free,
        )


def _check_latents(source: Source, options: ConversionOptions) -> None:
    unet_config, vae = source.sizes.unet_config, source.sizes.vae_config
    if unet_config.in_channels != vae.latent_channels:
        raise ConfigError(
            f"{source.name}: the U-Net reads {unet_config.in_channels} channels (inpainting or upscaling) and the VAE "
            f"makes {vae.latent_channels}; convert a text-to-image checkpoint"
        )
    smallest = 2 ** (len(unet_config.block_out_channels) - 1)
    for name, side in zip(("height", "width"), _latent_size(source, options), strict=True):
        if side < smallest:
            raise UsageError(f"latents of {name} {side} are too small for this U-Net, which halves them down to zero")
        if unet_config.downsample_padding == 0 and side % smallest:
            raise UsageError(
                f"latents of {name} {side} cannot be halved {len(unet_config.block_out_channels) - 1} times, as this "
                f"U-Net does without padding; choose a multiple of {smallest}"
            )


def _write_tokenizer(source: Source, folder: Path) -> None:
    """Save the tokenizer next to the packages, so that a runner needs only this folder."""
    source.tokenizer.save_pretrained(output_folder(folder))
