"""The networks of Stable Diffusion, with the ecosystem's parameter names."""

from sfumato.models.text_encoder import CLIPTextModel
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.unet import UNet2DConditionModel
from sfumato.models.vae import AutoencoderKL

__all__ = ["AutoencoderKL", "AutoencoderTiny", "CLIPTextModel", "UNet2DConditionModel"]
