"""The components of a pipeline folder: their names, locations, and how to load and save each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import schedulers
from sfumato.checkpoints.locate import index_of
from sfumato.errors import CheckpointError, ConfigError, UsageError, VariantError
from sfumato.files import LAYOUT_VERSION, read_json, write_json
from sfumato.folders import saving_into
from sfumato.image_processor import DPTImageProcessor
from sfumato.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    ControlNetUnionModel,
    DPTForDepthEstimation,
    StableUnCLIPImageNormalizer,
    T2IAdapter,
    UNet2DConditionModel,
)
from sfumato.models.base import Model, select_model_files
from sfumato.pipelines.multi_control import MultiAdapter, MultiControlNetModel, MultiControlNetUnionModel, Several
from sfumato.schedulers.base import Scheduler
from sfumato.schedulers.names import NAMES, resolve
from sfumato.text.tokenizer import CLIPTokenizer, select_tokenizer_files
from sfumato.values import check_argument, check_value, shown

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.families import Family

__all__ = [
    "COMPONENTS",
    "FLAGS",
    "INDEX",
    "OPTIONAL",
    "REQUIRED",
    "USUAL",
    "WITH_WEIGHTS",
    "ComponentFiles",
    "Index",
    "check_component",
    "choose_scheduler",
    "class_of_file",
    "component_class",
    "entry_of",
    "network_class",
    "read_index",
    "save_components",
    "scheduler_from_recipe",
    "up_to_date",
]

log = logging.getLogger("sfumato")

INDEX = "model_index.json"
USUAL = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "controlnet", "scheduler")
# With the additional components of some families.
COMPONENTS = (
    *USUAL, "image_encoder", "image_normalizer", "image_noising_scheduler", "low_res_scheduler", "adapter",
    "depth_estimator", "feature_extractor",
)  # fmt: skip
# Every checkpoint has these. Its text encoders and their tokenizers depend on its family. It has a ControlNet if it was
# saved from a pipeline with one.
REQUIRED = ("vae", "unet", "scheduler")
# The folders of further ControlNets and T2I-Adapters.
MORE_CONTROLS = tuple(f"{part}_{i}" for part in ("controlnet", "adapter") for i in range(1, 16))
# Components of the ecosystem's pipelines that do not affect how images are generated; never loaded here.
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")
OPTIONAL = ("safety_checker", "feature_extractor", "depth_estimator", "watermarker")
# Settings of a family in an index.
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "max_noise_level")

WITH_WEIGHTS = (Model, Several)
_CONTROLS = (ControlNetModel, MultiControlNetModel, ControlNetUnionModel, MultiControlNetUnionModel)
_ENCODERS: dict[str, Any] = {cls.__name__: cls for cls in (CLIPTextModel, CLIPTextModelWithProjection)}
_TOKENIZERS: dict[str, Any] = {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer}
_CLASSES: dict[str, dict[str, Any]] = {
    "vae": {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny},
    "text_encoder": _ENCODERS,
    "text_encoder_2": _ENCODERS,
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "image_encoder": {"CLIPVisionModelWithProjection": CLIPVisionModelWithProjection},
    "image_normalizer": {"StableUnCLIPImageNormalizer": StableUnCLIPImageNormalizer},
    "controlnet": {cls.__name__: cls for cls in _CONTROLS},
    "adapter": {cls.__name__: cls for cls in (T2IAdapter, MultiAdapter)},
    "depth_estimator": {"DPTForDepthEstimation": DPTForDepthEstimation},
    "feature_extractor": dict.fromkeys(
        ("DPTImageProcessor", "DPTImageProcessorPil", "DPTFeatureExtractor"), DPTImageProcessor
    ),
    "scheduler": {name: getattr(schedulers, name) for name in sorted({alias.class_name for alias in NAMES.values()})},
}
_CLASSES |= dict.fromkeys(("image_noising_scheduler", "low_res_scheduler"), _CLASSES["scheduler"])
_TYPES: dict[str, tuple[Any, ...]] = {
    "vae": (AutoencoderKL, AutoencoderTiny),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModel,),
    "tokenizer": (CLIPTokenizer,),
    "tokenizer_2": (CLIPTokenizer,),
    "unet": (UNet2DConditionModel,),
    "image_encoder": (CLIPVisionModelWithProjection,),
    "image_normalizer": (StableUnCLIPImageNormalizer,),
    "controlnet": (ControlNetModel, MultiControlNetModel, MultiControlNetUnionModel),
    "adapter": (T2IAdapter, MultiAdapter),
    "depth_estimator": (DPTForDepthEstimation,),
    "scheduler": (Scheduler,),
    "image_noising_scheduler": (Scheduler,),
    "low_res_scheduler": (Scheduler,),
}


@dataclass(frozen=True)
class Index:
    """The contents of a pipeline class's index: the class name, its components, those never loaded here, and flags."""

    class_name: str
    parts: tuple[str, ...] = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    absent: tuple[str, ...] = ABSENT
    flags: tuple[str, ...] = ("requires_safety_checker",)


@dataclass(frozen=True)
class ComponentFiles:
    """Which weight files to load, and how.

    use_safetensors: False allows pickled files; copy: read the weights instead of memory-mapping them; later: read them
    only when they are used; eight_bit: the U-Net's large ones are stored in 8 bits.
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    copy: bool = False
    later: bool = False
    eight_bit: bool = False

    def how(self, part: str) -> dict[str, Any]:
        """Return how to load a component, as keyword arguments of `Model.from_folder`."""
        return {"copy": self.copy, "later": self.later, "eight_bit": self.eight_bit and part == "unet"}

    def __post_init__(self) -> None:
        check_argument("variant", self.variant, str | None)

    def select(self, names: Sequence[str], strict: bool, skip: Sequence[str] = ()) -> list[str]:
        """Return the files of a repository that a pipeline needs, except for the components in `skip`."""
        if INDEX not in names:
            raise CheckpointError(
                f"there is no {INDEX}, so this is not a pipeline; load its components with their own classes"
            )
        chosen = [INDEX]
        variants = 0
        for part in COMPONENTS:
            if part in skip or not _has(names, part):
                continue
            if part.endswith("scheduler"):
                chosen.append(f"{part}/scheduler_config.json")
            elif part.startswith("tokenizer"):
                chosen += select_tokenizer_files(names, part)
            elif part == "feature_extractor":
                chosen += [name for name in names if name == f"{part}/{DPTImageProcessor.settings}"]
            else:
                stem = _TYPES[part][0].weights_name
                options = {"variant": self.variant, "use_safetensors": self.use_safetensors}
                files = select_model_files(names, part, stem, strict=strict, **options)
                variants += any(f".{self.variant}" in name for name in files)
                chosen += files
        if self.variant and not variants and len(skip) < len(COMPONENTS):
            raise VariantError(f"no component has a variant {self.variant!r}; omit variant to use the plain weights")
        return chosen


def read_index(folder: Path) -> dict[str, Any]:
    """Read `model_index.json`. Raises `CheckpointError` or `ConfigError` if it is invalid."""
    index = read_json(index_of(folder))
    check_value(str(folder / INDEX), "_class_name", index.get("_class_name"), str | None)
    for part in OPTIONAL:
        check_value(str(folder / INDEX), part, index.get(part), tuple[str | None, str | None] | None)
    return index


def component_class(folder: Path, index: Mapping[str, Any], part: str) -> Any:
    """Return the class that `model_index.json` names for a component; None for an optional component that is missing.

    Raises `CheckpointError` if a required component is missing, and `ConfigError` if the class is not supported.
    """
    entry = index.get(part)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[1], str):
        if part not in REQUIRED:
            return None
        raise CheckpointError(f"{folder / INDEX} lists no {part}, which text-to-image needs; pass {part}=…")
    known = _CLASSES[part]
    estimates = part in ("depth_estimator", "feature_extractor")
    if estimates and (entry[1] not in known or not (folder / part).is_dir()):
        return None  # what prepares images for networks that are not here, or an estimator that was left out
    if entry[1] not in known:
        raise ConfigError(
            f"{folder / INDEX}: {part} is a {entry[1]}, which is not supported; supported are {', '.join(known)}"
        )
    return known[entry[1]]


def class_of_file(family: Family, scheduler: Mapping[str, Any], part: str) -> Any:
    """Return the class of a component of a single-file checkpoint; None if its family does not have the component.

    Raises `ConfigError` if the scheduler is not supported.
    """
    encoders = {one.role: one for one in family.encoders}
    if part == "scheduler":
        name = scheduler.get("_class_name")
        if name not in _CLASSES[part]:
            raise ConfigError(f"there is no scheduler {shown(name)}; supported are {', '.join(_CLASSES[part])}")
        return _CLASSES[part][name]
    if part not in (*REQUIRED, *encoders) and not part.startswith("tokenizer"):
        return None
    if part.startswith("tokenizer"):
        return CLIPTokenizer if part.replace("tokenizer", "text_encoder") in encoders else None
    if part == "controlnet":
        return None
    if part.startswith("text_encoder"):
        projected = part in encoders and encoders[part].projected
        return None if part not in encoders else CLIPTextModelWithProjection if projected else CLIPTextModel
    return network_class(part)


def network_class(role: str) -> Any:
    """Return the usual class of a network."""
    return _TYPES[role][0]


def check_component(part: str, value: Any) -> None:
    """Raise `UsageError` unless the value can serve as this component."""
    if value is None and part in REQUIRED:
        raise UsageError(f"{part} is None; pass it too, or a text encoder with its tokenizer to encode prompts alone")
    if value is not None and part in _TYPES and not isinstance(value, _TYPES[part]):
        names = " or ".join(cls.__name__ for cls in _TYPES[part])
        article = "an" if names.startswith("A") else "a"
        raise UsageError(
            f"{part} must be {article} {names} from sfumato, not {type(value).__module__}.{type(value).__name__}"
        )


def choose_scheduler(name: str | None, current: Scheduler) -> Scheduler:
    """Create a scheduler for one run: the class for a short name, with the current scheduler's settings."""
    if name is None:
        return type(current).from_config(current.config)
    class_name, preset = resolve(name)
    return getattr(schedulers, class_name).from_config(current.config, **preset)


def scheduler_from_recipe(class_name: str, config: Mapping[str, Any]) -> Scheduler:
    """Create the scheduler that a recipe describes. Raises `UsageError` if its class does not exist."""
    if class_name not in _CLASSES["scheduler"]:
        raise UsageError(
            f"the recipe names a scheduler {shown(class_name)} that does not exist; the image may have been edited"
        )
    return _CLASSES["scheduler"][class_name].from_config(config)


def up_to_date(scheduler: Scheduler) -> Scheduler:
    """Correct two settings that are wrong in early checkpoints, as the ecosystem's pipelines of that time do."""
    changes = {}
    if scheduler.config.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if scheduler.config.get("clip_sample") is True:
        changes["clip_sample"] = False
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def save_components(
    components: Mapping[str, Any], folder: str | PathLike[str], kind: Index, flags: Mapping[str, Any], **options: Any
) -> None:
    """Write all components and the index atomically, in a form that the ecosystem's libraries can read.

    components: None for components that the index lists but that are missing; flags: must include the index's flags.
    """
    with saving_into(folder, last=INDEX, own=(*COMPONENTS, *OPTIONAL, *MORE_CONTROLS)) as new:
        index: dict[str, Any] = {"_class_name": kind.class_name, "_diffusers_version": LAYOUT_VERSION}
        for part, component in (dict.fromkeys(kind.absent) | dict(components)).items():
            index[part] = entry_of(part, None)
            if component is None:
                continue
            component.save_pretrained(new / part, **(options if isinstance(component, WITH_WEIGHTS) else {}))
            index[part] = entry_of(part, component)
        write_json(new / INDEX, index | {flag: flags[flag] for flag in kind.flags})


def entry_of(part: str, component: Any) -> list[str | None]:
    """Return a component's entry in an index: the library that reads it, and its class."""
    if component is None:
        return [None, None]
    theirs = ("text_encoder", "tokenizer", "image_encoder", "depth_estimator", "feature_extractor")
    library = "transformers" if part.startswith(theirs) else "diffusers"
    library = "stable_diffusion" if part == "image_normalizer" else library  # diffusers' module of its pipeline
    return [library, type(component).__name__]


def _has(names: Sequence[str], part: str) -> bool:
    """Return whether a repository must have a component. A text encoder and its tokenizer require each other."""
    if part in REQUIRED:
        return True
    if part not in COMPONENTS[:6]:
        return any(name.startswith(f"{part}/") for name in names)
    number = part.removeprefix("text_encoder").removeprefix("tokenizer")
    return any(name.startswith((f"text_encoder{number}/", f"tokenizer{number}/")) for name in names)
