"""Image to image: starts from a noised image, later in the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.tasks.task import Beginning, Task, start_index
from sfumato.schedulers.consistency import ConsistencyScheduler
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Tools
    from sfumato.schedulers.base import Scheduler

__all__ = ["ImageToImage"]


@dataclass(frozen=True)
class ImageToImage(Task):
    """Start from images: pixels (P, 3, H, W) in [-1, 1], or latents (P, C, h, w). Given noised latents replace them."""

    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """The size of the images."""
        begun = self.pixels if self.given.latents is None else self.given.latents
        config = self.parts.vae.config
        factor = config.scale_factor if begun.shape[1] == config.latent_channels != config.in_channels else 1
        return begun.shape[3] * factor, begun.shape[2] * factor

    def grid(self, scheduler: Scheduler) -> dict[str, Any]:
        """Like every task, plus the strength if it shortens the schedule."""
        shorter = {"strength": self.request.chosen_strength} if self._shortens(scheduler) else {}
        return super().grid(scheduler) | shorter

    def _shortens(self, scheduler: Scheduler) -> bool:
        return self.parts.family.shortens and isinstance(scheduler, ConsistencyScheduler)

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from the images' latents (B, C, h, w) with the noise for `strength`.

        No noise is added to another checkpoint's latents (`denoising_start`) or to given latents.
        """
        shortened = self._shortens(tools.scheduler) and self.request.denoising_start is None
        index = 0 if shortened else start_index(tools.scheduler, self.request)
        latents = self.given.latents
        if latents is not None:
            if latents.shape[0] != text.pictures:
                raise UsageError(f"got {latents.shape[0]} latents for {text.pictures} images; pass one per image")
            return Beginning(index, latents.to(tools.device, self.parts.state_dtype), text)
        clean = tools.encode(self.pixels)
        if self.request.denoising_start is not None:
            return Beginning(index, clean, text)
        noise = GaussianNoise(clean.shape, self.given.generators, tools.device)().to(clean.dtype)
        return Beginning(index, tools.scheduler.table(index).noised(clean, noise), text)
