"""Cheap previews: a linear map from latents to colors, fitted once to a checkpoint's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Colors"]

# Size of the latents that the matrix is fitted to, and of their uniform patches: images are smooth.
SIDE, PATCH = 16, 4


class Colors:
    """A linear approximation of a decoder, with one pixel per latent."""

    def __init__(self, decode: Callable[[Tensor], Tensor], channels: int) -> None:
        """decode: latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1]."""
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn(1, channels, SIDE // PATCH, SIDE // PATCH, generator=generator)
        grain = torch.randn(1, channels, SIDE, SIDE, generator=generator)
        latents = torch.nn.functional.interpolate(patches, scale_factor=PATCH) * 0.9 + grain * 0.4
        pixels = torch.nn.functional.adaptive_avg_pool2d(decode(latents).float().cpu(), SIDE)
        rows = torch.cat([latents.flatten(2)[0].T, torch.ones(SIDE * SIDE, 1)], 1)
        self._matrix = torch.linalg.lstsq(rows, pixels.flatten(2)[0].T).solution  # (C + 1, 3)

    def image(self, latents: Tensor) -> Image.Image:
        """Convert the first of the latents (B, C, h, w) to an image of w × h pixels."""
        one = latents[0].float().cpu().nan_to_num(0.0, 0.0, 0.0)
        pixels = torch.einsum("chw,cd->hwd", one, self._matrix[:-1]) + self._matrix[-1]
        return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
