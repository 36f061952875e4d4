"""The ecosystem's pipelines by task: they select the pipeline that fits a checkpoint's family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sfumato.errors import UsageError
from sfumato.models import ControlNetUnionModel
from sfumato.pipelines.multi_control import MultiControlNetUnionModel
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public import controlnet
from sfumato.pipelines.public.inpainting import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from sfumato.pipelines.public.latent_consistency import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)
from sfumato.pipelines.public.stable_diffusion import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from sfumato.pipelines.public.stable_diffusion_xl import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["AutoPipelineForImage2Image", "AutoPipelineForInpainting", "AutoPipelineForText2Image"]

# The pipelines of each family, by task.
KIN = (
    {
        "text": StableDiffusionPipeline,
        "image": StableDiffusionImg2ImgPipeline,
        "mask": StableDiffusionInpaintPipeline,
    },
    {
        "text": StableDiffusionXLPipeline,
        "image": StableDiffusionXLImg2ImgPipeline,
        "mask": StableDiffusionXLInpaintPipeline,
    },
    {"text": LatentConsistencyModelPipeline, "image": LatentConsistencyModelImg2ImgPipeline},
)
# The same with a ControlNet: for Stable Diffusion, for XL, and for XL with a ControlNet Union.
STEERED = tuple(
    {
        task: getattr(controlnet, f"StableDiffusion{family}{kind}Pipeline")
        for task, kind in (("text", ""), ("image", "Img2Img"), ("mask", "Inpaint"))
    }
    for family in ("ControlNet", "XLControlNet", "XLControlNetUnion")
)


class _Auto:
    task: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise UsageError(f"{name} is created with {name}.from_pretrained or {name}.from_pipe")

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **keywords: Any) -> DiffusionPipeline:
        """Load a checkpoint for this task; keywords as in `DiffusionPipeline.from_pretrained`, and a `controlnet`."""
        beside = {"controlnet": keywords.pop("controlnet")} if "controlnet" in keywords else {}
        return cls.from_pipe(DiffusionPipeline.from_pretrained(name, **keywords), **beside)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """Create the pipeline for this task from another one's components, which are shared, not copied.

        components: replace them; a `controlnet` selects the ControlNet pipeline for the task. Raises `UsageError` if
        there is no such pipeline.
        """
        kins = [kin for kin in (*KIN, *STEERED) if isinstance(pipeline, tuple(kin.values()))]
        if (net := components.get("controlnet")) is not None and kins:
            union = isinstance(net, (ControlNetUnionModel, MultiControlNetUnionModel))
            kins = [STEERED[(1 + union) if pipeline.parts.family.sizes else 0]]
        for kin in kins:
            if cls.task in kin:
                return kin[cls.task].from_pipe(pipeline, **components)
        raise UsageError(f"there is no {cls.__name__} for a {type(pipeline).__name__}")


class AutoPipelineForText2Image(_Auto):
    """Text-to-image with any checkpoint."""

    task = "text"


class AutoPipelineForImage2Image(_Auto):
    """Image-to-image with any checkpoint."""

    task = "image"


class AutoPipelineForInpainting(_Auto):
    """Inpainting with any checkpoint."""

    task = "mask"
