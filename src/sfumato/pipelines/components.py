"""The parts of a pipeline folder: which there are, where each lies, how each is loaded and saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato import schedulers
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.weights import find_weights
from sfumato.errors import CheckpointError, ConfigError, UsageError
from sfumato.files import LAYOUT_VERSION, output_folder, read_json, write_json
from sfumato.models import AutoencoderKL, AutoencoderTiny, CLIPTextModel, UNet2DConditionModel
from sfumato.models.base import Model, select_model_files
from sfumato.schedulers.base import Scheduler
from sfumato.schedulers.names import NAMES, resolve
from sfumato.text.tokenizer import CLIPTokenizer, select_tokenizer_files

if TYPE_CHECKING:
    from os import PathLike

__all__ = [
    "COMPONENTS",
    "INDEX",
    "OPTIONAL",
    "ComponentFiles",
    "check_component",
    "choose_scheduler",
    "component_class",
    "load_components",
    "save_components",
    "scheduler_from_recipe",
    "up_to_date",
]

log = logging.getLogger("sfumato")

INDEX = "model_index.json"
COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
# Parts of the ecosystem's pipelines that say whether a picture is shown, not how it is drawn; never loaded here.
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")

_CLASSES: dict[str, dict[str, Any]] = {
    "vae": {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny},
    "text_encoder": {"CLIPTextModel": CLIPTextModel},
    "tokenizer": {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer},
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "scheduler": {name: getattr(schedulers, name) for name in sorted({alias.class_name for alias in NAMES.values()})},
}
_TYPES: dict[str, tuple[Any, ...]] = {
    "vae": (AutoencoderKL, AutoencoderTiny),
    "text_encoder": (CLIPTextModel,),
    "tokenizer": (CLIPTokenizer,),
    "unet": (UNet2DConditionModel,),
    "scheduler": (Scheduler,),
}
Dtypes = torch.dtype | Mapping[str, torch.dtype] | None


@dataclass(frozen=True)
class ComponentFiles:
    """Which weight files to take: a variant, and whether pickled ones are allowed; and how.

    copy: read weights rather than map them; later: read them only when they are needed.
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    copy: bool = False
    later: bool = False

    def select(self, names: Sequence[str], strict: bool, skip: Sequence[str] = ()) -> list[str]:
        """The files of a repository that a pipeline needs, but for the components in `skip`."""
        if INDEX not in names:
            raise CheckpointError(
                f"there is no {INDEX}, so this is not a pipeline; load its parts by their own classes"
            )
        chosen = [INDEX]
        variants = 0
        for part in COMPONENTS:
            if part in skip:
                continue
            if part == "scheduler":
                chosen.append("scheduler/scheduler_config.json")
            elif part == "tokenizer":
                chosen += select_tokenizer_files(names, part)
            else:
                stem = _TYPES[part][0].weights_name
                options = {"variant": self.variant, "use_safetensors": self.use_safetensors}
                files = select_model_files(names, part, stem, strict=strict, **options)
                variants += any(f".{self.variant}" in name for name in files)
                chosen += files
        if self.variant and not variants and len(skip) < len(COMPONENTS):
            raise CheckpointError(
                f"no component has a variant {self.variant!r}; leave variant out to use the plain weights"
            )
        return chosen


def load_components(
    name: str | PathLike[str], files: ComponentFiles, dtypes: Dtypes, given: Mapping[str, Any], hub: Mapping[str, Any]
) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """Load every component that is not given; returns them, the folder, and the index.

    Raises `CheckpointError` or `ConfigError` naming file and key.
    """
    folder = locate_folder(name, lambda names, strict: files.select(names, strict, tuple(given)), **hub)
    index = read_json(folder / INDEX)
    _check_variant(folder, files, given)
    loaded: dict[str, Any] = {}
    for part in COMPONENTS:
        if part in given:
            loaded[part] = given[part]
            continue
        cls = component_class(folder, index, part)
        if issubclass(cls, Model):
            options = {"variant": files.variant, "use_safetensors": files.use_safetensors}
            how = {"dtype": _dtype_of(part, dtypes), "copy": files.copy, "later": files.later}
            loaded[part] = cls.from_folder(folder / part, **options, **how)
        elif issubclass(cls, CLIPTokenizer):
            loaded[part] = cls.from_folder(folder / part)
        else:
            loaded[part] = cls.from_pretrained(folder, subfolder=part)
    return loaded, folder, index


def component_class(folder: Path, index: Mapping[str, Any], part: str) -> Any:
    """The class that `model_index.json` names for a component. Raises `ConfigError` for one we do not have."""
    entry = index.get(part)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[1] is None:
        raise CheckpointError(f"{folder / INDEX} names no {part}; text-to-image needs one, so pass {part}=… yourself")
    known = _CLASSES[part]
    if entry[1] not in known:
        raise ConfigError(
            f"{folder / INDEX}: {part} is a {entry[1]}, which is not supported; supported are {', '.join(known)}"
        )
    return known[entry[1]]


def check_component(part: str, value: Any) -> None:
    """Raise `UsageError` unless the value can serve as this component."""
    if not isinstance(value, _TYPES[part]):
        names = " or ".join(cls.__name__ for cls in _TYPES[part])
        raise UsageError(f"{part} must be a {names} from sfumato, not {type(value).__module__}.{type(value).__name__}")


def choose_scheduler(name: str | None, current: Scheduler) -> Scheduler:
    """A fresh scheduler for one run: the current one's settings in the class that a short name stands for."""
    if name is None:
        return type(current).from_config(current.config)
    class_name, preset = resolve(name)
    return getattr(schedulers, class_name).from_config(current.config, **preset)


def scheduler_from_recipe(class_name: str, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler a recipe describes. Raises `UsageError` for a class that does not exist."""
    if class_name not in _CLASSES["scheduler"]:
        raise UsageError(f"the recipe names a scheduler {class_name!r} that does not exist; was the picture edited?")
    return _CLASSES["scheduler"][class_name].from_config(config)


def up_to_date(scheduler: Scheduler) -> Scheduler:
    """Two settings that early checkpoints have wrong, and that every Stable Diffusion pipeline corrects."""
    changes = {}
    if scheduler.config.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if scheduler.config.get("clip_sample") is True:
        changes["clip_sample"] = False
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def save_components(
    components: Mapping[str, Any], folder: str | PathLike[str], class_name: str, **options: Any
) -> None:
    """Write all components and, last, the index, in a form the ecosystem's own libraries read."""
    path = output_folder(folder)
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": LAYOUT_VERSION}
    for part in COMPONENTS:
        component = components[part]
        check_component(part, component)
        component.save_pretrained(path / part, **(options if isinstance(component, Model) else {}))
        library = "transformers" if part in ("text_encoder", "tokenizer") else "diffusers"
        index[part] = [library, type(component).__name__]
    index |= {part: [None, None] for part in OPTIONAL} | {"requires_safety_checker": False}
    write_json(path / INDEX, index)


def _dtype_of(part: str, dtypes: Dtypes) -> torch.dtype:
    if isinstance(dtypes, Mapping):
        return dtypes.get(part, dtypes.get("default", torch.float32))
    return dtypes or torch.float32


def _check_variant(folder: Path, files: ComponentFiles, given: Mapping[str, Any]) -> None:
    """Where only some components have the variant, the others fall back to their plain weights: say so."""
    if files.variant is None:
        return
    plain = []
    parts = [part for part in ("text_encoder", "unet", "vae") if part not in given]
    for part in parts:
        stem = _TYPES[part][0].weights_name
        found = find_weights(folder / part, stem, variant=files.variant, use_safetensors=files.use_safetensors)
        if not any(f".{files.variant}" in path.name for path in found):
            plain.append(part)
    if plain and len(plain) == len(parts):
        raise CheckpointError(f"{folder} has no variant {files.variant!r}; leave variant out to use the plain weights")
    if plain:
        log.warning("no %r variant of %s; using the plain weights there", files.variant, ", ".join(plain))
