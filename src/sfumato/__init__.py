"""Sfumato: Stable Diffusion that fits the machine it runs on.

Names are loaded when they are first used, so that `import sfumato` costs nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfumato.models import AutoencoderKL, AutoencoderTiny, CLIPTextModel, UNet2DConditionModel
    from sfumato.pipelines import (
        DiffusionPipeline,
        Result,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionPipeline,
        load,
    )
    from sfumato.request import GenerateRequest
    from sfumato.schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )
    from sfumato.text import CLIPTokenizer

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DiffusionPipeline",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "GenerateRequest",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Result",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
    "__version__",
    "load",
]

_ROOMS = {
    "models": ("AutoencoderKL", "AutoencoderTiny", "CLIPTextModel", "UNet2DConditionModel"),
    "text": ("CLIPTokenizer",),
    "request": ("GenerateRequest",),
    "pipelines": (
        "DiffusionPipeline",
        "Result",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionPipeline",
        "load",
    ),
}
_HOME = {name: f"sfumato.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "sfumato.schedulers")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
