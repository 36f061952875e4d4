"""Drawing with converted models: the one loop, the same schedulers and seeds, other networks."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from sfumato.coreml.backends import engine_for
from sfumato.coreml.networks import ConvertedNetwork, ConvertedUNet, sides
from sfumato.coreml.parts import open_parts
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.images import fitted
from sfumato.pipelines.pipeline import StableDiffusionPipeline
from sfumato.pipelines.place import Place
from sfumato.request import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Generator
    from os import PathLike

    from torch import Tensor

    from sfumato.coreml.runtime import Precision
    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.result import Result, Step
    from sfumato.runtime.plan import Plan

__all__ = ["CoreMLPipeline", "FixedPlace", "load_pipeline"]

log = logging.getLogger("sfumato")

OPTIONS = ("compute_unit", "model_version", "kind", "reduce_memory", "portable", "precision")


def load_pipeline(
    folder: str | PathLike[str],
    *,
    compute_unit: str | None = None,
    model_version: str | None = None,
    kind: str | None = None,
    reduce_memory: bool = False,
    portable: bool = False,
    precision: Precision = "float32",
) -> CoreMLPipeline:
    """Make a folder of converted models, or one around it, ready to draw.

    compute_unit: "ALL", "CPU_AND_GPU", "CPU_ONLY" or "CPU_AND_NE", all there are if None; without Core ML, the portable
    runtime computes on the CPU. model_version: the checkpoint that the models are of, a folder or a hub id, where they
    do not say it themselves. kind: "packages" or "compiled", where there are both. reduce_memory: each model is
    loaded for its own stage and let go after it. portable: use the portable runtime on macOS too. precision: of the
    portable runtime; "typed" rounds to half precision wherever the models do. Raises `CheckpointError` for models that
    are missing or do not fit, `UsageError` for a unit that is not there.
    """
    engine = engine_for(compute_unit, portable=portable, precision=precision)
    parts = open_parts(Path(folder).expanduser(), engine, model_version, kind=kind)
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
    """Stable Diffusion whose networks are converted models. Made by `load_pipeline`.

    Requests, calls, schedulers, seeds and recipes are those of every pipeline; the size of the pictures is the models'
    own. `details` is what recipes say of the models.
    """

    details: dict[str, Any]

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.place = FixedPlace()
        self.details = {}

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **keywords: Any) -> CoreMLPipeline:
        """As `load_pipeline`, whose options are the keywords. Raises `UnknownArgument` for another one."""
        for keyword in keywords:
            if keyword not in OPTIONS:
                raise UnknownArgument(
                    f"a folder of converted models is loaded without {keyword!r}{suggest(keyword, OPTIONS)}; the "
                    f"options are {', '.join(OPTIONS)}"
                )
        return load_pipeline(name, **keywords)

    def to(self, *places: Any, **named: Any) -> Self:
        """Refused: where converted models compute is chosen when they are loaded."""
        raise UsageError("converted models cannot be moved or cast; choose a compute unit when loading them")

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Refused: what the models were converted from can be saved."""
        raise UsageError("converted models cannot be saved as a checkpoint; save the one they were made from")

    def read_picture(self, image: Any, size: tuple[int, int] | None) -> Tensor:
        """A picture to start from, cut to the shape of the models' size around its middle and resized to it.

        Arrays and tensors must have that size.
        """
        return super().read_picture(self._fitted(image), size)

    def _fitted(self, image: Any) -> Any:
        if isinstance(image, (list, tuple)):
            return [self._fitted(one) for one in image]
        if not isinstance(image, Image.Image):
            return image
        width, height = self.size_of(GenerateRequest())
        if image.width * height != image.height * width:
            log.warning(
                "the picture is %d × %d and the models' are %d × %d: what is beyond that shape was cut off",
                *image.size,
                width,
                height,
            )
        return fitted(image, (width, height))

    def stream(self, request: GenerateRequest) -> Generator[Step, None, Result]:
        """As every pipeline's; the recipes also say which models drew, and by what."""
        result = yield from super().stream(request)
        recipes = [recipe | {"coreml": self.details} for recipe in result.recipes]
        return dataclasses.replace(result, recipes=recipes)


class FixedPlace(Place):
    """Converted models stay as they are, and draw one size.

    note: told with every result, and once in the log. reduce_memory: models are let go after each stage.
    """

    def __init__(self, note: str | None = None, *, reduce_memory: bool = False) -> None:
        super().__init__()
        self.note, self.reduce_memory = note, reduce_memory

    def plan(self, pipeline: DiffusionPipeline, request: GenerateRequest) -> Plan | None:
        """None: there is nothing to decide. Raises `UsageError` for a size that the models do not have."""
        width, height = pipeline.size_of(GenerateRequest())
        if (request.width, request.height) != (width, height):
            raise UsageError(
                f"these models draw pictures of {width} × {height} and of no other size, so not of {request.width} × "
                f"{request.height}; leave width and height out, or convert the checkpoint for that size"
            )
        return None

    def largest_batch(self, pipeline: DiffusionPipeline, request: GenerateRequest) -> int:
        """How many pictures one call of the U-Net draws at."""
        unet = pipeline.unet
        rows = sides(unet.chain, "sample")[0] if isinstance(unet, ConvertedUNet) else 1
        return max(1, rows // (2 if request.guidance_scale > 1 else 1))

    def bring(self, pipeline: DiffusionPipeline, part: str, plan: Plan | None, notes: list[str]) -> None:
        """Nothing but the note: a model that is not there is loaded when it is asked."""
        if self.note is not None and self.note not in notes:
            self._say(self.note, notes)

    def leave(self, pipeline: DiffusionPipeline, part: str, plan: Plan | None) -> None:
        """Let go of a network's models, where memory is to be spared."""
        network = getattr(pipeline, part)
        if self.reduce_memory and isinstance(network, ConvertedNetwork):
            network.release()
