"""Checkpoints that read an image next to the latents: instruction-based editing, and depth-guided redrawing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sfumato.pipelines.tasks.image_to_image import ImageToImage
from sfumato.pipelines.tasks.task import Beginning, Task, first_noise, for_batch

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.tasks.task import Tools

__all__ = ["Depth", "Edit"]


@dataclass(frozen=True)
class Edit(Task):
    """Start from noise, with the image to edit as an input (InstructPix2Pix, arXiv 2211.09800).

    pixels: (P, 3, H, W), or latents. Guidance has three branches: unconditional, image only, and image and prompt, the
    last one once for each prompt joined by `AND`.
    """

    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """The size of the image."""
        factor = self.parts.vae_scale_factor if self.pixels.shape[1] == 4 else 1
        return self.pixels.shape[3] * factor, self.pixels.shape[2] * factor

    @property
    def guided(self) -> bool:
        """Whether guidance by prompt and image is applied."""
        return super().guided and self.request.chosen_image_scale >= 1

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Start from noise (B, C, h, w). The image's latents are its mean, unscaled, as in training."""
        image = tools.encode(self.pixels, sampled=False)
        if self.pixels.shape[1] == 3 and "scaled image latents" not in self.parts.family.extra:
            image = self.parts.vae.unscaled(image)
        latents = first_noise(self, text.pictures, tools) * tools.scheduler.init_noise_sigma
        if text.branches == text.prompts:
            return Beginning(0, latents, replace(text, extra=(image,)))
        branched = {name: getattr(text, name) for name in ("embeds", "pooled", "sizes")}
        three = {name: (branches[0], *branches) for name, branches in branched.items() if branches}
        seen = (torch.zeros_like(image), *[image] * text.branches)
        return Beginning(0, latents, replace(text, **three, extra=seen))


@dataclass(frozen=True)
class Depth(ImageToImage):
    """Image-to-image with a depth map as an input: depth (P, H, W) on any scale, larger is nearer.

    If it is None, depth is estimated from the image, in the form in which it was given.
    """

    depth: Tensor | None
    image: Any

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Like image-to-image. Resizes the depth map to the latents' size, and scales it to [-1, 1] per image."""
        depth = tools.depth(self.image) if self.depth is None else self.depth
        (width, height), factor = self.size, self.parts.vae_scale_factor
        size = (height // factor, width // factor)
        depth = F.interpolate(depth.float()[:, None], size=size, mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        spread = torch.where(high > low, high - low, 1.0)  # a constant map becomes -1, which is far away
        depth = for_batch(2 * (depth - low) / spread - 1, text.pictures, "depth maps")
        told = replace(text, extra=(depth.to(tools.device, self.parts.state_dtype),))
        return super().begin(told, tools)
