"""Drafts: a quick first look at a request, with fewer steps and a tiny decoder where one is at hand."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.configs import AutoencoderTinyConfig
from sfumato.errors import SfumatoError
from sfumato.files import expanded
from sfumato.pipelines.parts import Parts
from sfumato.pipelines.vaes import open_vae
from sfumato.request import AdapterFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sfumato.families import Family
    from sfumato.pipelines.source import Source
    from sfumato.request import GenerateRequest

__all__ = ["Sketched", "drafted"]

# Models that take more steps get these. UniPC was made for so few: its authors report images of Stable Diffusion with
# guidance after 5 to 10 (arXiv 2302.04867), those of DPM-Solver++ after 15 to 20 (arXiv 2211.01095). Models trained as
# EDM need solvers of their own. Few-step models keep their scheduler and steps, which are the least they are made for.
STEPS, SOLVER, EDM_SOLVER = 10, "unipc", "edm_dpmpp_2m"
# The built-in model was distilled for so few steps of LCM, as a LoRA.
FEW, FEW_STEPS = f"{BUILT_IN}/few-step", {"steps": 4, "scheduler": "lcm", "guidance_scale": 1.0}
# Tiny autoencoders by the latents that they decode: channels, and the scale of the VAE that made them.
TINY = {(4, 0.18215): "madebyollin/taesd", (4, 0.13025): "madebyollin/taesdxl"}


@dataclass(frozen=True)
class Sketched:
    """What a draft depends on: a model's name, family, default settings and VAE config; path: where it is, if known."""

    name: str
    family: Family
    settings: Mapping[str, Any]
    vae: Any
    path: str | None = None

    @classmethod
    def of(cls, model: Parts | Source, path: str | None = None) -> Sketched:
        """Describe a checkpoint, loaded or not."""
        vae = model.vae.config if isinstance(model, Parts) else model.config("vae")
        return cls(model.name, model.family, model.settings, vae, path or model.name)

    @property
    def published(self) -> str | None:
        """The hub id of the tiny autoencoder for its latents; None if there is none, or it has one already."""
        if isinstance(self.vae, AutoencoderTinyConfig):
            return None
        return TINY.get((self.vae.latent_channels, round(self.vae.scaling_factor, 5)))

    @property
    def tiny(self) -> str | None:
        """A tiny autoencoder on this machine for its latents: made for the built-in model, beside it, or in the cache.

        None if there is none, or where it would not do.
        """
        # Editing models read an image's latents without their scale, which those of a tiny autoencoder always have.
        if isinstance(self.vae, AutoencoderTinyConfig) or "image latents" in self.family.extra:
            return None
        if self.name.partition("/")[0] == BUILT_IN:
            return f"{BUILT_IN}/tiny-vae"
        known = self.published
        beside = () if known is None or self.path is None else _beside(expanded(self.path), known.rpartition("/")[2])
        for name in (*beside, known):
            try:
                its = None if name is None else open_vae(name).config
            except SfumatoError:
                continue
            if isinstance(its, AutoencoderTinyConfig) and its.latent_channels == self.vae.latent_channels:
                return name
        return None


def drafted(
    request: GenerateRequest, model: Parts | Source | Sketched, path: str | None = None
) -> tuple[GenerateRequest, list[str]]:
    """Return the request with a draft's settings in place of `draft`, and a note on them; unchanged without `draft`.

    Whatever the request says keeps its value. path: where the model is, if its name is not a path.
    """
    if not request.draft:
        return request, []
    model = model if isinstance(model, Sketched) else Sketched.of(model, path)
    custom, adapters = request.timesteps or request.sigmas or request.spacing, request.adapters
    settings: dict[str, Any] = {"vae": request.vae or model.tiny}
    own = model.settings["steps"]
    if model.name == BUILT_IN and not custom and _suits_few(request):
        settings |= FEW_STEPS
        adapters = adapters if any(one.file == FEW for one in adapters) else (*adapters, AdapterFile(file=FEW))
    elif own <= STEPS:
        settings |= {"steps": own}
    else:
        edm = model.family.scheduler["_class_name"].startswith("EDM")
        settings |= {"steps": STEPS} | ({} if custom else {"scheduler": EDM_SOLVER if edm else SOLVER})
    # From an image, only a share of the steps is run, so that few of them could be none.
    if request.image is not None and settings["steps"] < STEPS and not model.family.shortens:
        settings["steps"] = math.ceil(settings["steps"] / max(request.chosen_strength, 0.1))
    left_open = {name: value for name, value in settings.items() if getattr(request, name) is None}
    request = request.replace(draft=False, adapters=adapters, **left_open)
    return request, [_note(request, model)]


def _suits_few(request: GenerateRequest) -> bool:
    """Return whether a request leaves room for what the built-in model's few steps need."""
    # They were distilled with guidance, and a refiner would have none of them left.
    unguided = request.guidance_scale is None or request.guidance_scale <= 1
    return unguided and request.scheduler in (None, FEW_STEPS["scheduler"]) and request.refiner is None


def _beside(path: Path, wanted: str) -> Iterator[str]:
    """Yield the folders and files in a model's folder that have the name of a tiny autoencoder, such as taesdxl."""
    try:
        names = sorted(os.listdir(path.parent)) if os.path.exists(path) else []
    except OSError:
        return
    for name in names:
        if name.lower().startswith("taesd") and name.lower().startswith("taesdxl") == (wanted == "taesdxl"):
            yield str(path.parent / name)


def _note(request: GenerateRequest, model: Sketched) -> str:
    """Return in one sentence what a draft does, and how to get the full image."""
    custom = request.timesteps or request.sigmas
    steps = len(custom) if custom else request.settled(model.settings).chosen_steps
    lora = f" with {FEW}" if any(one.file == FEW for one in request.adapters) else ""
    fetch = f" (--vae {model.published} would be quicker)" if request.vae is None and model.published else ""
    scheduler, vae = request.scheduler or "the model's scheduler", request.vae or "the model's VAE"
    return (
        f"a draft: {steps} step{'s' * (steps > 1)} of {scheduler}{lora}, decoded by {vae}{fetch}; for the full image, "
        "drop draft (--draft)"
    )
