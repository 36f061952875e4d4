"""The public pipelines."""

from typing import Any

from sfumato.ecosystem import absent
from sfumato.pipelines.loading import load
from sfumato.pipelines.multi_control import MultiAdapter, MultiControlNetModel, MultiControlNetUnionModel
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.auto import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from sfumato.pipelines.public.controlnet import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from sfumato.pipelines.public.editing import (
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from sfumato.pipelines.public.inpainting import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from sfumato.pipelines.public.latent_consistency import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)
from sfumato.pipelines.public.likeness import StableDiffusionImageVariationPipeline, StableUnCLIPImg2ImgPipeline
from sfumato.pipelines.public.stable_diffusion import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from sfumato.pipelines.public.stable_diffusion_xl import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from sfumato.pipelines.public.upscaling import StableDiffusionLatentUpscalePipeline, StableDiffusionUpscalePipeline
from sfumato.pipelines.result import Result

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DiffusionPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "MultiAdapter",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "Result",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLPipeline",
    "StableUnCLIPImg2ImgPipeline",
    "load",
]


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
