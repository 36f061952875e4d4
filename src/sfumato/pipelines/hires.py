"""Between the two passes of a request (`Hires`): the image is enlarged, as latents or as pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sfumato.request import Hires

__all__ = ["enlarged"]

# The interpolation mode for latents, and whether to antialias.
LATENT = {
    "latent": ("bilinear", False), "latent-antialiased": ("bilinear", True), "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True), "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}  # fmt: skip


def enlarged(
    latents: Tensor, hires: Hires, unit: int, pictures: Callable[[Tensor], list[Image.Image]]
) -> Tensor | list[Image.Image]:
    """Enlarge latents (B, C, h, w) for the second pass: to latents (B, C, h', w'), or to images of that size.

    unit: pixels per latent pixel; pictures: a function that decodes latents, used only by upscalers of pixels.
    """
    height, width = (side * unit for side in latents.shape[2:])
    whole, kept = hires.sizes(width, height, unit)
    if hires.upscaler in LATENT:
        mode, smooth = LATENT[hires.upscaler]
        size = [side // unit for side in reversed(whole)]
        more: dict[str, Any] = {"antialias": True} if smooth else {}
        top, left, bottom, right = _middle(whole, kept, unit)
        return F.interpolate(latents, size=size, mode=mode, **more)[:, :, top:bottom, left:right]
    top, left, bottom, right = _middle(whole, kept, 1)
    images = [image.resize(whole, Image.Resampling.LANCZOS) for image in pictures(latents)]
    return [image.crop((left, top, right, bottom)) for image in images]


def _middle(whole: tuple[int, int], kept: tuple[int, int], unit: int) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the centered crop, in units."""
    left, top = ((more - less) // unit // 2 for more, less in zip(whole, kept, strict=True))
    return top, left, top + kept[1] // unit, left + kept[0] // unit
