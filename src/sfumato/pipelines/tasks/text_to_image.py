"""Text to image: starts from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.errors import UsageError
from sfumato.pipelines.tasks.task import Beginning, Task
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Tools

__all__ = ["TextToImage"]


@dataclass(frozen=True)
class TextToImage(Task):
    """Start from noise, the caller's or new."""

    @property
    def size(self) -> tuple[int, int]:
        """The requested size, or else that of the given latents, or else the checkpoint's own."""
        latents, factor = self.given.latents, self.parts.vae_scale_factor
        if latents is None or self.request.width is not None or latents.ndim != 4:
            return self.parts.size_of(self.request)
        return latents.shape[3] * factor, latents.shape[2] * factor

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from noise (B, C, h, w) at the first entry of the schedule."""
        parts, request, latents = self.parts, self.request, self.given.latents
        width, height = parts.size_of(request)
        factor = parts.vae_scale_factor
        shape = (text.pictures, parts.vae.config.latent_channels, height // factor, width // factor)
        if latents is None:
            latents = GaussianNoise(shape, self.given.generators, tools.device)()
        elif request.width is None and latents.shape[:2] == shape[:2]:
            pass  # the size of the latents is the size of the image
        elif tuple(latents.shape) != shape:
            raise UsageError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
        latents = latents.to(tools.device, parts.state_dtype) * tools.scheduler.init_noise_sigma
        return Beginning(0, latents, text)
