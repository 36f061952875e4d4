"""What the loop asks at each step: the U-Net's prediction, steered by the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.models.blocks import sinusoidal_embedding

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.models.unet import UNet2DConditionModel

__all__ = ["Guidance", "guide", "rescale"]


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): away from the negative prompt, towards the prompt."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, factor: float) -> Tensor:
    """Bring the guided prediction back towards the conditional one's spread (arXiv 2305.08891, eq. 15 and 16)."""
    dims = tuple(range(1, guided.ndim))
    spread = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided


@dataclass(kw_only=True)
class Guidance:
    """The U-Net together with what it is told.

    embeds (B, S, C); negative_embeds the same, or None for no guidance; both may be replaced between steps. Predictions
    come back in float32 (float64 if the U-Net is), so that guidance does not round twice.
    """

    unet: UNet2DConditionModel
    embeds: Tensor
    negative_embeds: Tensor | None
    scale: float
    rescale: float = 0.0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Scaled latents (B, C, h, w) at timestep t -> the prediction (B, C, h, w)."""
        dtype, unet = x.dtype, self.unet
        x = x.to(unet.dtype)
        condition = self._scale_condition(x)
        if self.negative_embeds is None:
            return unet(x, t, self.embeds, timestep_cond=condition, return_dict=False)[0].to(dtype)
        embeds = torch.cat([self.negative_embeds, self.embeds])
        both = unet(torch.cat([x, x]), t, embeds, return_dict=False)[0].to(dtype)
        unconditional, conditional = both.chunk(2)
        guided = guide(unconditional, conditional, self.scale)
        return rescale(guided, conditional, self.rescale) if self.rescale > 0 else guided

    def replace_embeds(self, embeds: Tensor) -> None:
        """Read other embeddings: (B, S, C), which ends guidance, or (2B, S, C) with the negative ones first."""
        batch = self.embeds.shape[0]
        if embeds.shape[0] == batch:
            self.embeds, self.negative_embeds = embeds, None
        else:
            self.negative_embeds, self.embeds = embeds.chunk(2)

    def _scale_condition(self, x: Tensor) -> Tensor | None:
        """Models distilled for guidance read the scale itself (arXiv 2310.04378, section 4.2)."""
        channels = self.unet.config.time_cond_proj_dim
        if channels is None:
            return None
        scale = torch.full((x.shape[0],), (self.scale - 1) * 1000, device=x.device)
        return sinusoidal_embedding(scale, channels, flip_sin_to_cos=False, freq_shift=1).to(x.dtype)
