"""The networks of Stable Diffusion, with the parameter names of diffusers and transformers."""

from typing import Any

from sfumato.ecosystem import absent
from sfumato.models.controlnet import ControlNetModel
from sfumato.models.controlnet_union import ControlNetUnionModel
from sfumato.models.depth import DPTForDepthEstimation
from sfumato.models.image_encoder import CLIPVisionModelWithProjection, StableUnCLIPImageNormalizer
from sfumato.models.t2i_adapter import T2IAdapter
from sfumato.models.text_encoder import CLIPTextModel, CLIPTextModelWithProjection
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.unet import UNet2DConditionModel
from sfumato.models.vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "ControlNetModel",
    "ControlNetUnionModel",
    "DPTForDepthEstimation",
    "StableUnCLIPImageNormalizer",
    "T2IAdapter",
    "UNet2DConditionModel",
]


def __getattr__(name: str) -> Any:
    raise absent("package", name, __name__)
