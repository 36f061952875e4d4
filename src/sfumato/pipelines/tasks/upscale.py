"""Upscaling: ×4 from pixels, ×2 from latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sfumato.errors import UsageError
from sfumato.pipelines.tasks.task import Beginning, Task, first_noise, for_batch
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Tools
    from sfumato.schedulers.base import Scheduler

__all__ = ["Upscale", "UpscaleLatents"]

NOISE_LEVEL = 20


@dataclass(frozen=True)
class Upscale(Task):
    """Enlarge images by the autoencoder's factor, 4, with the pixels (P, 3, H, W) as an input of the U-Net.

    Noise of the request's level is added to them, and the level is passed to the U-Net. tiled: predict in tiles of the
    size that the checkpoint was trained at, so that memory does not grow with the image.
    """

    pixels: Tensor
    tiled: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """The size of the result."""
        factor = self.parts.vae_scale_factor
        return self.pixels.shape[3] * factor, self.pixels.shape[2] * factor

    @property
    def tile(self) -> int | None:
        """The checkpoint's own size."""
        return max(self.parts.unet.config.latent_size) if self.tiled else None

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from noise (B, C, H, W), one latent per input pixel. Raises `UsageError` if the level is too high."""
        parts, batch = self.parts, text.pictures
        level = NOISE_LEVEL if self.request.noise_level is None else self.request.noise_level
        if level > parts.max_noise_level:
            raise UsageError(f"noise_level must be at most {parts.max_noise_level} with this checkpoint, not {level}")
        several = isinstance(self.given.generators, (list, tuple))
        pixels = for_batch(self.pixels, batch, "sources") if several else self.pixels
        pixels = pixels.to(tools.device, parts.state_dtype)
        noise = GaussianNoise(pixels.shape, self.given.generators, tools.device)().to(pixels)
        levels = torch.full((pixels.shape[0],), level, device=tools.device)
        noisy = parts.noising("low_res_scheduler").add_noise(pixels, noise, levels)
        noisy = for_batch(noisy, batch, "sources")
        latents = first_noise(self, batch, tools) * tools.scheduler.init_noise_sigma
        label = torch.full((batch,), level, device=tools.device)
        return Beginning(0, latents, replace(text, extra=(noisy,), labels=(label,) * text.branches))


@dataclass(frozen=True)
class UpscaleLatents(Task):
    """Enlarge images two times: pixels (P, 3, H, W), or scaled latents (P, 4, h, w)."""

    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """The size of the result."""
        factor = self.parts.vae_scale_factor if self.pixels.shape[1] == 4 else 1
        return 2 * factor * self.pixels.shape[3], 2 * factor * self.pixels.shape[2]

    def scheduled(self, scheduler: Scheduler) -> Scheduler:
        """Return the scheduler set up for k-diffusion's U-Net, which predicts velocity and takes log noise levels.

        Uses Karras et al.'s preconditioning (arXiv 2206.00364, table 1). Raises `UsageError` for other schedulers.
        """
        config = scheduler.config
        if config.own("timestep_type") is None:
            raise UsageError(f"this upscaler needs EulerDiscreteScheduler, not {type(scheduler).__name__}")
        return type(scheduler).from_config(config, prediction_type="v_prediction", timestep_type="continuous")

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from noise (B, C, 2h, 2w). The time condition is the image's noise level, 0, and the pooled prompt."""
        image = F.interpolate(tools.encode(self.pixels), scale_factor=2, mode="nearest")
        latents = first_noise(self, text.pictures, tools) * tools.scheduler.init_noise_sigma
        none = torch.cat([torch.ones(text.pictures, 64), torch.zeros(text.pictures, 64)], dim=1)
        told = tuple(torch.cat([none.to(pooled), pooled], dim=1) for pooled in text.pooled)
        return Beginning(0, latents, replace(text, pooled=(), extra=(image,), time_condition=told))
