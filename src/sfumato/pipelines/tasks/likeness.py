"""Image variations: the U-Net reads an image encoder's embedding of the source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError
from sfumato.models.blocks import sinusoidal_embedding
from sfumato.pipelines.tasks.text_to_image import TextToImage
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Beginning, Tools

__all__ = ["Likeness"]


@dataclass(frozen=True)
class Likeness(TextToImage):
    """Start from noise, with an image's embedding as a class label (unCLIP, arXiv 2204.06125)."""

    image: Any

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Add noise of the request's level to the embedding (P, D) and append it; negative branches get zeros."""
        embeds = self.given.image_embeds
        embeds = tools.see(self.image) if embeds is None else embeds.to(tools.device, self.parts.state_dtype)
        if text.pictures % embeds.shape[0]:
            raise UsageError(
                f"got {embeds.shape[0]} input images for {text.pictures} images; pass one, or one per prompt"
            )
        several = isinstance(self.given.generators, (list, tuple))
        told = self._noisy(embeds.repeat(text.pictures // embeds.shape[0] if several else 1, 1), tools)
        told = told.repeat_interleave(text.pictures // told.shape[0], dim=0)
        labels = (torch.zeros_like(told),) * (text.branches - text.prompts) + (told,) * text.prompts
        return super().begin(replace(text, labels=labels), tools)

    def _noisy(self, embeds: Tensor, tools: Tools) -> Tensor:
        parts, level = self.parts, self.request.noise_level or 0
        if parts.image_normalizer is None:
            raise UsageError("this checkpoint needs an image normalizer, which is missing; pass image_normalizer=…")
        noise = GaussianNoise(embeds.shape, self.given.generators, tools.device)().to(embeds)
        levels = torch.full((embeds.shape[0],), level, device=tools.device)
        normal = parts.image_normalizer.scale(embeds)
        noisy = parts.image_normalizer.unscale(
            parts.noising("image_noising_scheduler").add_noise(normal, noise, levels)
        )
        waves = sinusoidal_embedding(levels, embeds.shape[1], flip_sin_to_cos=True, freq_shift=0)
        return torch.cat([noisy, waves.to(noisy)], dim=1)
