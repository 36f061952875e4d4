"""Results: images, and how each one was made."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato import __version__
from sfumato.outputs import Output
from sfumato.runtime.processor import system_build

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sfumato.request import GenerateRequest
    from sfumato.runtime.plan import Plan

__all__ = [
    "ImagePipelineOutput",
    "Result",
    "StableDiffusionPipelineOutput",
    "StableDiffusionXLPipelineOutput",
    "Step",
    "versions",
]


@dataclass(frozen=True, eq=False)
class StableDiffusionPipelineOutput(Output):
    """The result of a pipeline call. images: PIL images, an array or a tensor.

    `nsfw_content_detected` is None, because there is no safety checker. `notes` lists Sfumato's own decisions.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class StableDiffusionXLPipelineOutput(Output):
    """The result of a Stable Diffusion XL pipeline call, with only `images` and `notes`."""

    images: Any
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class ImagePipelineOutput(StableDiffusionXLPipelineOutput):
    """The result of an upscaler's or unCLIP pipeline's call."""


@dataclass(frozen=True)
class Step:
    """One finished denoising step, counted from 1, of `total`; latents (B, C, h, w) in float32."""

    number: int
    total: int
    timestep: float
    latents: Tensor
    _preview: Any = field(repr=False)
    _original: Any = field(repr=False, default=None)

    def original(self) -> Tensor:
        """Return the model's estimate of the clean latents (B, C, h, w) at this step."""
        return self._original()

    def preview(self) -> list[Image]:
        """Return the model's estimate of the images at this step. Costs one VAE decoding."""
        return self._preview()


@dataclass(frozen=True)
class Result:
    """The images of a request.

    images: with a seed and a recipe (as written into PNGs) for each; request: with all defaults filled in; notes:
    Sfumato's own decisions, such as dropping words that did not fit; seconds: per stage; plan: None in float64 and for
    Core ML models; controls: the preprocessed control images.
    """

    images: list[Image]
    request: GenerateRequest
    seeds: tuple[int, ...]
    recipes: list[dict[str, Any]]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    plan: Plan | None = None
    controls: tuple[Image, ...] = ()


def versions() -> dict[str, str]:
    """Return the software versions that an image depends on."""
    import torch

    found = {"sfumato": __version__, "torch": torch.__version__, "python": platform.python_version()}
    build = system_build()
    return found if build is None else found | {"macos": f"{platform.mac_ver()[0]} ({build})"}
