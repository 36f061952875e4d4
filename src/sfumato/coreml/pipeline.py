"""Generation with converted models: the same loop, schedulers and seeds, with other networks."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from sfumato.coreml.backends import engine_for
from sfumato.coreml.networks import ConvertedNetwork, ConvertedUNet, sides
from sfumato.coreml.parts import open_parts
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.files import expanded
from sfumato.images import fitted
from sfumato.pipelines.place import Place
from sfumato.pipelines.public.stable_diffusion import StableDiffusionPipeline
from sfumato.request import GenerateRequest
from sfumato.runtime.device import reused_memory

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from os import PathLike

    from sfumato.adapters.outfit import Worn
    from sfumato.coreml.runtime import Precision
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.result import Result, Step
    from sfumato.runtime.plan import Plan

__all__ = ["CoreMLPipeline", "FixedPlace", "load_pipeline"]

log = logging.getLogger("sfumato")

OPTIONS = ("compute_unit", "model_version", "kind", "reduce_memory", "portable", "precision", "local_files_only")


def load_pipeline(
    folder: str | PathLike[str],
    *,
    compute_unit: str | None = None,
    model_version: str | None = None,
    kind: str | None = None,
    reduce_memory: bool = False,
    portable: bool = False,
    precision: Precision = "float32",
    local_files_only: bool = False,
) -> CoreMLPipeline:
    """Load a folder of converted models, or a folder that contains one, as a pipeline.

    compute_unit: "ALL", "CPU_AND_GPU", "CPU_ONLY" or "CPU_AND_NE"; None for all. Without Core ML, the portable runtime
    uses the CPU. model_version: the checkpoint the models were made from, a folder or a hub id, if they do not name it.
    kind: "packages" or "compiled", if there are both. reduce_memory: keep each model in memory only for its own stage.
    portable: use the portable runtime on macOS, too. precision: of the portable runtime; "typed" rounds to half
    precision wherever the models do. local_files_only: never download the small files of that checkpoint. Raises
    `CheckpointError` if models are missing or do not fit, and `UsageError` if the compute unit is not available.
    """
    engine = engine_for(compute_unit, portable=portable, precision=precision)
    parts = open_parts(expanded(folder), engine, model_version, kind=kind, local_files_only=local_files_only)
    pipeline = CoreMLPipeline(
        text_encoder=parts.text_encoder,
        unet=parts.unet,
        vae=parts.vae,
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
    )
    pipeline.name, pipeline.suggested, pipeline.details = str(folder), parts.suggested, parts.details
    pipeline.place = FixedPlace(engine.note, reduce_memory=reduce_memory)
    if not reduce_memory:
        for network in (parts.text_encoder, parts.unet, parts.vae):
            network.load()
    return pipeline


class CoreMLPipeline(StableDiffusionPipeline):
    """Stable Diffusion with converted models as networks. Created by `load_pipeline`.

    Requests, calls, schedulers, seeds and recipes work as in every pipeline; the image size is fixed by the models.
    `details` is what recipes record about the models.
    """

    details: dict[str, Any]

    def _begin(self, parts: Parts, place: Place | None = None) -> None:
        super()._begin(parts, place or FixedPlace())
        self.details = {}

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **keywords: Any) -> CoreMLPipeline:
        """Like `load_pipeline`, with its options as keywords. Raises `UnknownArgument` for any other keyword."""
        for keyword in keywords:
            if keyword not in OPTIONS:
                raise UnknownArgument(
                    f"a folder of converted models is loaded without {keyword!r}{suggest(keyword, OPTIONS)}; the "
                    f"options are {', '.join(OPTIONS)}"
                )
        return load_pipeline(name, **keywords)

    def to(self, *places: Any, **named: Any) -> Self:
        """Raise `UsageError`: the compute unit is chosen when converted models are loaded."""
        raise UsageError("converted models cannot be moved or cast; choose a compute unit when loading them")

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Raise `UsageError`: only the checkpoint that the models were converted from can be saved."""
        raise UsageError("converted models cannot be saved as a checkpoint; save the one they were made from")

    def stream(self, request: GenerateRequest) -> Generator[Step, None, Result]:
        """Like `stream` of other pipelines; the recipes also name the models and the backend."""
        for name in ("vae", "draft"):
            if getattr(request, name):
                raise UsageError(f"converted models do not support {name}; drop it, or use the checkpoint itself")
        with reused_memory():
            result = yield from super().stream(request)
        recipes = [recipe | {"coreml": self.details} for recipe in result.recipes]
        return dataclasses.replace(result, recipes=recipes)


class FixedPlace(Place):
    """A place for converted models, which cannot be moved and have a fixed image size.

    note: added to every result, and logged once. reduce_memory: release models after each stage.
    """

    def __init__(self, note: str | None = None, *, reduce_memory: bool = False) -> None:
        super().__init__()
        self.note, self.reduce_memory = note, reduce_memory

    def fitted(self, parts: Parts, image: Any) -> Any:
        """Return an input image, center-cropped to the models' aspect ratio and resized to their size.

        Arrays and tensors are returned unchanged, so they must have that size.
        """
        if isinstance(image, (list, tuple)):
            return [self.fitted(parts, one) for one in image]
        if not isinstance(image, Image.Image):
            return image
        width, height = parts.size_of(GenerateRequest())
        if image.width * height != image.height * width:
            log.warning(
                "the input image is %d × %d, but the models need %d × %d; it was cropped to that shape",
                *image.size,
                width,
                height,
            )
        return fitted(image, (width, height))

    def plan(self, parts: Parts, request: GenerateRequest, worn: Sequence[Worn] = ()) -> Plan | None:
        """Return None: there is nothing to plan. Raises `UsageError` for a size or feature that the models lack."""
        width, height = parts.size_of(GenerateRequest())
        for name in ("freeu", "seamless", "hires"):
            if getattr(request, name) is not None:
                raise UsageError(f"converted models do not support {name}; drop it, or use the checkpoint itself")
        if (request.width, request.height) != (width, height):
            raise UsageError(
                f"these models only generate images of {width} × {height}, not {request.width} × "
                f"{request.height}; omit width and height, or convert the checkpoint for that size"
            )
        return None

    def largest_batch(self, parts: Parts, request: GenerateRequest) -> int:
        """Return how many images one call of the U-Net processes."""
        unet = parts.unet
        rows = sides(unet.chain, "sample")[0] if isinstance(unet, ConvertedUNet) else 1
        return max(1, rows // (2 if request.chosen_scale > 1 else 1))

    def bring(self, parts: Parts, part: str, plan: Plan | None, notes: list[str], worn: Sequence[Worn] = ()) -> None:
        """Only add the note: models are loaded on first use."""
        if self.note is not None and self.note not in notes:
            self._say(self.note, notes)

    def leave(self, parts: Parts, part: str, plan: Plan | None) -> None:
        """Release a network's models with `reduce_memory`."""
        for network in parts.stage(part).values():
            if self.reduce_memory and isinstance(network, ConvertedNetwork):
                network.release()
