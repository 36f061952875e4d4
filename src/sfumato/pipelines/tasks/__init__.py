"""Tasks: each sets the image size, the loop's starting point, and what the U-Net receives.

To add one, write a module here and add a line to `task_for`. The run and the loop do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sfumato.errors import UsageError
from sfumato.images import open_image, open_mask, to_pixels
from sfumato.masks import called_canvas, requested_canvas
from sfumato.pipelines.tasks.edit import Depth, Edit
from sfumato.pipelines.tasks.image_to_image import ImageToImage
from sfumato.pipelines.tasks.inpaint import Inpaint
from sfumato.pipelines.tasks.likeness import Likeness
from sfumato.pipelines.tasks.text_to_image import TextToImage
from sfumato.pipelines.tasks.upscale import Upscale, UpscaleLatents

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.masks import Canvas
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.pipelines.stages import Given
    from sfumato.pipelines.tasks.task import Task
    from sfumato.request import GenerateRequest

__all__ = ["task_for"]


# Additional inputs of U-Nets, by the families' names for them.
MASK, DEPTH, PIXELS = ("mask", "masked image latents"), ("depth",), ("low-resolution image",)
EDITED, ENLARGED = (("image latents",), ("scaled image latents",)), ("enlarged image latents",)


def task_for(parts: Parts, place: Place, request: GenerateRequest, given: Given) -> Task:
    """Create the task for a request, and read its images.

    Raises `UsageError` if an input of the U-Net is missing, and if an image cannot be read.
    """
    reads = parts.family.extra
    image = given.image if request.image is None else open_image(request.image)
    masked = request.mask is not None or given.mask_image is not None
    depth = given.depth_map if request.depth is None else _levels(request.depth)
    _check_reads(parts, image=image is not None, masked=masked, depth=depth is not None)
    if parts.family.labels == "image embedding":
        return Likeness(parts, request, given, image)
    if image is None:
        if request.denoising_start is not None:
            raise UsageError("denoising_start continues from the latents of another checkpoint; pass them as the image")
        return TextToImage(parts, request, given)
    size = None if request.width is None or request.height is None else (request.width, request.height)
    if masked:
        return Inpaint(parts, request, given, _canvas(parts, request, given, image, size))
    pixels = given.pixels
    if pixels is None:
        how = {"resample": Image.Resampling.BICUBIC} if reads in (PIXELS, ENLARGED) else {}
        pixels = to_pixels(place.fitted(parts, image), parts.vae_scale_factor, size, **how)
    if reads == PIXELS:
        return Upscale(parts, request, given, pixels, tiled=request.image is not None)
    if reads == ENLARGED:
        return UpscaleLatents(parts, request, given, pixels)
    if reads in EDITED:
        return Edit(parts, request, given, pixels)
    if reads == DEPTH:
        return Depth(parts, request, given, pixels, depth, image)
    return ImageToImage(parts, request, given, pixels)


def _check_reads(parts: Parts, *, image: bool, masked: bool, depth: bool) -> None:
    """Raise `UsageError` if an additional input of the U-Net is missing, or if it has no such input."""
    reads, channels = parts.family.extra, parts.unet.config.in_channels
    if channels != parts.vae.config.latent_channels and not reads:
        raise UsageError(f"this U-Net has {channels} input channels, unlike any known family; use another checkpoint")
    there = {MASK: masked, DEPTH: image and (depth or parts.depth_estimator is not None)}
    if reads and not there.get(reads, image):
        needs = {MASK: "an image and its mask", DEPTH: "an image and its depth map"}.get(reads, "an image")
        raise UsageError(
            f"{parts.family.title} needs {' and '.join(reads)} ({channels} channels in all); pass {needs}, or use "
            "another checkpoint"
        )
    if (masked and reads not in ((), MASK)) or (depth and reads != DEPTH):
        what = "depth map" if depth else "mask"
        raise UsageError(f"{parts.family.title} does not use a {what}; omit it, or use another checkpoint")


def _canvas(parts: Parts, request: GenerateRequest, given: Given, image: Any, size: tuple[int, int] | None) -> Canvas:
    factor = parts.vae_scale_factor
    if request.mask is None:
        return called_canvas(image, given.mask_image, parts.size_of(request), factor, given.padding_mask_crop)
    own = parts.size_of(request.replace(width=None, height=None))
    return requested_canvas(image, request.mask, size, own, factor)


def _levels(file: str) -> Tensor:
    """Read a depth map (1, H, W) from a file."""
    return torch.from_numpy(np.asarray(open_mask(file), dtype=np.float32) / 255)[None]
