"""Inpainting: generates inside the mask and keeps the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sfumato.errors import UsageError
from sfumato.pipelines.tasks.task import Beginning, Kept, Task, first_noise, for_batch, start_index

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sfumato.masks import Canvas
    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Tools

__all__ = ["Inpaint"]


@dataclass(frozen=True)
class Inpaint(Task):
    """Change a part of images, with an inpainting checkpoint or with a plain one."""

    canvas: Canvas

    @property
    def size(self) -> tuple[int, int]:
        """The size of the canvas."""
        height, width = self.canvas.mask.shape[2:]
        return width, height

    def finish(self, picture: Image) -> Image:
        """Paste the result into the original image."""
        return self.canvas.finish(picture)

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from noise, or from the image's latents (B, C, h, w) with the noise for `strength`."""
        request, given, batch = self.request, self.given, text.pictures
        index = start_index(tools.scheduler, request)
        table = tools.scheduler.table(index)
        reads_mask = bool(self.parts.family.extra)
        grey = bool(((self.canvas.coarse > 0) & (self.canvas.coarse < 1)).any())
        blends, begun = not reads_mask or grey, request.chosen_strength < 1 or request.denoising_start is not None
        clean = None
        if blends or (begun and given.latents is None) or request.denoising_start is not None:
            clean = tools.encode(self.canvas.pixels)
        noise = first_noise(self, batch, tools)
        if clean is not None and request.denoising_start is not None:
            latents = clean
        elif clean is not None and begun and given.latents is None:
            latents = table.noised(clean, noise)
        else:
            latents = noise * tools.scheduler.init_noise_sigma
        mask = for_batch(self.canvas.coarse, batch, "masks").to(latents)
        told = text
        if reads_mask:
            told = replace(text, extra=(torch.cat([(mask > 0).to(mask), self._surroundings(batch, tools)], dim=1),))
        elif given.masked_image_latents is None and self.canvas.pixels.shape[1] == 3:
            tools.pass_over(self.canvas.pixels)
        kept = Kept(mask, clean, noise, table) if blends and clean is not None else None
        return Beginning(index, latents, told, kept)

    def _surroundings(self, batch: int, tools: Tools) -> Tensor:
        """Return the latents (B, C, h, w) of the unchanged area."""
        ready = self.given.masked_image_latents
        if ready is not None:
            return for_batch(ready, batch, "masked_image_latents").to(tools.device, self.parts.state_dtype)
        if self.canvas.pixels.shape[1] != 3:
            raise UsageError(
                "this checkpoint needs the masked image, and latents cannot be masked; pass the image itself, or "
                "masked_image_latents too"
            )
        return tools.encode(self.canvas.kept)
