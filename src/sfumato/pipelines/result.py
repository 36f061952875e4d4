"""What comes out: pictures, and how each of them came to be."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from torch import Tensor

    from sfumato.request import GenerateRequest
    from sfumato.runtime.plan import Plan

__all__ = ["Result", "StableDiffusionPipelineOutput", "Step", "versions"]


@dataclass(frozen=True)
class StableDiffusionPipelineOutput:
    """What a pipeline call returns: images as PIL images, an array or a tensor.

    `nsfw_content_detected` is None, as there is no safety checker; `notes` says what was done without being asked for.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    notes: tuple[str, ...] = ()

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, index) if isinstance(index, str) else (self.images, self.nsfw_content_detected)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.nsfw_content_detected))


@dataclass(frozen=True)
class Step:
    """One finished denoising step, counted from 1, of `total`; latents (B, C, h, w) in float32."""

    number: int
    total: int
    timestep: float
    latents: Tensor
    _preview: Any = field(repr=False)

    def preview(self) -> list[Image]:
        """The pictures the model has in mind at this point; costs one decoding."""
        return self._preview()


@dataclass(frozen=True)
class Result:
    """The pictures of a request.

    images, and for each its seed and its recipe (what a PNG carries); the request with everything it left open filled
    in; notes: what was done without being asked for, such as words that did not fit; seconds spent in each stage; the
    plan it was drawn by, None in float64 and for converted models.
    """

    images: list[Image]
    request: GenerateRequest
    seeds: tuple[int, ...]
    recipes: list[dict[str, Any]]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    plan: Plan | None = None


def versions() -> dict[str, str]:
    """The versions a picture depends on."""
    import torch

    return {"sfumato": __version__, "torch": torch.__version__, "python": platform.python_version()}
