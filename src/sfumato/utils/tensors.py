"""Images from tensors and arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.image_processor import VaeImageProcessor
from sfumato.images import from_pixels, to_pictures

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["numpy_to_pil", "pt_to_pil"]


def pt_to_pil(images: Tensor) -> list[Image]:
    """Convert decoded images (B, 3, H, W) in [-1, 1] to PIL images."""
    return to_pictures(from_pixels(images))


def numpy_to_pil(images: np.ndarray) -> list[Image]:
    """Convert an array (H, W, 3) or (B, H, W, 3) in [0, 1] to PIL images."""
    return VaeImageProcessor.numpy_to_pil(images)
