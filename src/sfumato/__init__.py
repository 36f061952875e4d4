"""Sfumato: Stable Diffusion that fits the machine it runs on.

Names are imported on first use, so that `import sfumato` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfumato.image_processor import VaeImageProcessor
    from sfumato.models import (
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        ControlNetModel,
        ControlNetUnionModel,
        T2IAdapter,
        UNet2DConditionModel,
    )
    from sfumato.pipelines import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        DiffusionPipeline,
        LatentConsistencyModelImg2ImgPipeline,
        LatentConsistencyModelPipeline,
        MultiAdapter,
        MultiControlNetModel,
        MultiControlNetUnionModel,
        Result,
        StableDiffusionAdapterPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionDepth2ImgPipeline,
        StableDiffusionImageVariationPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionLatentUpscalePipeline,
        StableDiffusionPipeline,
        StableDiffusionUpscalePipeline,
        StableDiffusionXLAdapterPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetUnionImg2ImgPipeline,
        StableDiffusionXLControlNetUnionInpaintPipeline,
        StableDiffusionXLControlNetUnionPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLInstructPix2PixPipeline,
        StableDiffusionXLPipeline,
        StableUnCLIPImg2ImgPipeline,
        load,
    )
    from sfumato.request import (
        AdapterFile,
        Control,
        EmbeddingFile,
        Fast,
        Framing,
        FreeU,
        GenerateRequest,
        GuidanceInterval,
        Hires,
        ImagePrompt,
        Mask,
        Reuse,
    )
    from sfumato.schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        EDMDPMSolverMultistepScheduler,
        EDMEulerScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
    from sfumato.text import CLIPTokenizer

__all__ = [
    "AdapterFile",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "Control",
    "ControlNetModel",
    "ControlNetUnionModel",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DiffusionPipeline",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EmbeddingFile",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Fast",
    "Framing",
    "FreeU",
    "GenerateRequest",
    "GuidanceInterval",
    "HeunDiscreteScheduler",
    "Hires",
    "ImagePrompt",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "Mask",
    "MultiAdapter",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "PNDMScheduler",
    "Result",
    "Reuse",
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
    "T2IAdapter",
    "TCDScheduler",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
    "VaeImageProcessor",
    "__version__",
    "load",
]

_ROOMS = {
    "models": (
        "AutoencoderKL",
        "AutoencoderTiny",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "ControlNetModel",
        "ControlNetUnionModel",
        "T2IAdapter",
        "UNet2DConditionModel",
    ),
    "image_processor": ("VaeImageProcessor",),
    "text": ("CLIPTokenizer",),
    "request": (
        "AdapterFile",
        "Control",
        "EmbeddingFile",
        "Fast",
        "Framing",
        "FreeU",
        "GenerateRequest",
        "GuidanceInterval",
        "Hires",
        "ImagePrompt",
        "Mask",
        "Reuse",
    ),
    "pipelines": (
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
    ),
}
# Modules that code written for diffusers accesses without importing them, such as `sfumato.utils.load_image`.
_MODULES = {name: name for name in ("image_processor", "models", "pipelines", "schedulers", "utils")}
_MODULES["logging"] = "utils.logging"
_HOME = {name: f"sfumato.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"sfumato.{_MODULES[name]}")
    if name not in __all__:
        from sfumato.ecosystem import absent

        raise absent("package", name, "sfumato")
    value = getattr(import_module(_HOME.get(name, "sfumato.schedulers")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
