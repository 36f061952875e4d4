"""Configurations: frozen dataclasses whose field names are the keys of the checkpoint's JSON files."""

from sfumato.configs.autoencoders import AutoencoderKLConfig, AutoencoderTinyConfig
from sfumato.configs.config import Config, one_of, parse
from sfumato.configs.configured import Configured
from sfumato.configs.controlnet import ControlNetConfig, ControlNetUnionConfig
from sfumato.configs.depth import DPTConfig, DPTImageProcessorConfig
from sfumato.configs.image_encoder import CLIPVisionConfig, ImageNormalizerConfig
from sfumato.configs.t2i_adapter import T2IAdapterConfig
from sfumato.configs.text_encoder import CLIPTextConfig
from sfumato.configs.unet import K_GROUP, UNet2DConditionConfig

__all__ = [
    "K_GROUP",
    "AutoencoderKLConfig",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Config",
    "Configured",
    "ControlNetConfig",
    "ControlNetUnionConfig",
    "DPTConfig",
    "DPTImageProcessorConfig",
    "ImageNormalizerConfig",
    "T2IAdapterConfig",
    "UNet2DConditionConfig",
    "one_of",
    "parse",
]
