"""Masked images: reading masks, and compositing the generated area back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter

from sfumato.errors import UsageError
from sfumato.images import MAX_PIXELS, open_mask, to_pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.request import Mask

__all__ = ["Canvas", "called_canvas", "crop_region", "cropped", "overlay", "read_mask", "requested_canvas"]

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Canvas:
    """An image with a masked area to be generated.

    pixels: (P, 3, H, W) in [-1, 1], or latents (P, 4, h, w). mask: (M, 1, H, W) in [0, 1], how much of each pixel to
    generate. coarse: (M, 1, h, w), the same for latents. finish: turns a generated image into the final one.
    """

    pixels: Tensor
    mask: Tensor
    coarse: Tensor
    finish: Callable[[Image.Image], Image.Image]

    @property
    def kept(self) -> Tensor:
        """The pixels with the masked area in middle gray, as inpainting checkpoints were trained."""
        return self.pixels * (self.mask == 0)


def requested_canvas(image: Image.Image, mask: Mask, size: Size | None, own: Size, factor: int) -> Canvas:
    """Prepare the canvas of a request: the whole image, or the area around its mask, enlarged.

    size: the requested size. own: the checkpoint's native size. factor: image pixels per latent pixel; the canvas is a
    multiple of it. Without a requested size, the result has the size of the image. Raises `UsageError` for a mask of
    another size or an empty one.
    """
    painted = Image.new("L", image.size) if mask.file is None else open_mask(mask.file)
    if painted.size != image.size:
        raise UsageError(
            f"the mask is {_by(painted.size)} and its image {_by(image.size)}; give a mask of the image's size"
        )
    if any(mask.extend):
        image, painted = _extended(image, painted, mask.extend, mask.chosen_edge)
    if painted.getbbox() is None:
        raise UsageError(f"nothing in the mask {mask.file} is white, so nothing would change; use another one")
    box = (0, 0, *image.size)
    if mask.crop is not None:
        box = crop_region(painted, size or own, mask.crop)
    elif size is not None:
        image, painted = image.resize(size, Image.Resampling.LANCZOS), painted.resize(size, Image.Resampling.BOX)
        box = (0, 0, *size)
    region = (box[2] - box[0], box[3] - box[1])
    inside = region if mask.crop is None else _enlarged(region, size or own, factor)
    part = image.crop(box), painted.crop(box)
    if inside != region:
        part = part[0].resize(inside, Image.Resampling.LANCZOS), part[1].resize(inside, Image.Resampling.BOX)
    part = tuple(_padded(one, factor) for one in part)
    levels = torch.from_numpy(np.asarray(part[1], dtype=np.float32) / 255)[None, None]
    alpha = _soft(painted, mask.chosen_edge) if mask.composite else Image.new("L", image.size, 255)

    def finish(picture: Image.Image) -> Image.Image:
        picture = picture.crop((0, 0, *inside))
        whole = image.copy()
        whole.paste(picture if inside == region else picture.resize(region, Image.Resampling.LANCZOS), box[:2])
        return Image.composite(whole, image, alpha)

    return Canvas(to_pixels(part[0], 1), levels, F.max_pool2d(levels, factor), finish)


def called_canvas(image: Any, mask: Any, size: Size, factor: int, margin: int | None = None) -> Canvas:
    """Prepare the canvas of a call with the interface of diffusers: a fixed size, and a binary mask.

    image: as in `to_pixels`, or latents. mask: a PIL image, an array (H, W), (B, H, W) or with a last axis of 1, a
    tensor (H, W), (B, H, W) or (B, 1, H, W), in [0, 1], or a list of these. margin: generate only the area of a PIL
    mask and this many pixels around it. Raises `UsageError`.
    """
    finish = _as_it_is
    if margin is not None:
        if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
            raise UsageError("padding_mask_crop needs a PIL image and a PIL mask; pass those, or omit it")
        if image.size != mask.size:
            raise UsageError(f"the mask is {_by(mask.size)} and its image {_by(image.size)}; resize one of them")
        original, levels = image.convert("RGB"), mask.convert("L")
        box = crop_region(levels, size, margin)
        image, mask = cropped(original, mask, size, margin), cropped(mask, mask, size, margin)
        finish = partial(overlay, levels, original, box=box)
    pixels = to_pixels(image, 1, size)
    if pixels.shape[1] == 3 and pixels.shape[2:] != size[::-1]:
        pixels = F.interpolate(pixels, size=size[::-1])
    read = (read_mask(mask, size) >= 0.5).float()
    return Canvas(pixels, read, F.interpolate(read, size=(size[1] // factor, size[0] // factor)), finish)


def read_mask(mask: Any, size: tuple[int | None, int | None], factor: int = 1) -> Tensor:
    """Convert a mask in any form to (M, 1, H, W) in [0, 1].

    mask: as in `called_canvas`. size: (width, height), None for a side of the mask's own length; both are rounded down
    to multiples of `factor`. Raises `UsageError` for anything else.
    """

    def fitted(*own: int) -> Size:
        wide, high = (max(factor, (side or one) // factor * factor) for side, one in zip(size, own, strict=True))
        return wide, high

    if isinstance(mask, (list, tuple)) and mask:
        first = read_mask(mask[0], size, factor)
        return torch.cat([first, *(read_mask(one, (first.shape[3], first.shape[2])) for one in mask[1:])])
    if isinstance(mask, Image.Image):
        levels = mask.resize(fitted(*mask.size), Image.Resampling.LANCZOS).convert("L")
        return torch.from_numpy(np.asarray(levels, dtype=np.float32) / 255)[None, None]
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "fb":
        flat = mask[..., 0] if mask.ndim > 2 and mask.shape[-1] == 1 else mask
        mask = torch.from_numpy(np.ascontiguousarray(flat, dtype=np.float32))
    if not isinstance(mask, torch.Tensor) or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise UsageError(
            f"mask_image must be a PIL image, an array or a tensor of numbers in [0, 1], or a list of these, not "
            f"{type(mask).__name__}"
        )
    if mask.ndim not in (2, 3, 4) or not mask.numel() or (mask.ndim == 4 and mask.shape[1] != 1):
        raise UsageError(f"a mask has one channel and two sides, but its shape is {tuple(mask.shape)}")
    levels = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if levels.min() < 0 or levels.max() > 1:
        raise UsageError("a mask must have values in [0, 1], with 1 where the image may change; rescale this one")
    wide, high = fitted(levels.shape[3], levels.shape[2])
    return F.interpolate(levels, size=(high, wide))


def crop_region(mask: Image.Image, size: Size, margin: int = 0) -> Box:
    """Return the box (left, top, right, bottom) of a mask and its margin, grown to the aspect ratio of `size`.

    The image's borders may limit it in one direction. Raises `UsageError` for an empty mask.
    """
    found = mask.convert("L").getbbox()
    if found is None:
        raise UsageError("the mask is empty: nothing in it is white, so there is nothing to crop to; use another one")
    (left, right), (top, bottom) = (
        (max(low - margin, 0), min(high + margin, end))
        for low, high, end in ((found[0], found[2], mask.width), (found[1], found[3], mask.height))
    )
    wide, high = right - left, bottom - top
    if wide / high > size[0] / size[1]:
        top, bottom = _grown(top, bottom, int(wide / (size[0] / size[1]) - high), mask.height)
    else:
        left, right = _grown(left, right, int(high * (size[0] / size[1]) - wide), mask.width)
    return left, top, right, bottom


def cropped(image: Image.Image, mask: Image.Image, size: Size, margin: int) -> Image.Image:
    """Crop an image to the area around a mask, and enlarge it to fill `size`. Raises `UsageError` for an empty mask."""
    return _filled(image.crop(crop_region(mask, size, margin)), size)


def _grown(low: int, high: int, more: int, end: int) -> tuple[int, int]:
    """Grow an interval by `more` on both sides together, within 0 and `end`."""
    low, high = low - more // 2, high + more - more // 2
    beyond = max(0, high - end)
    low, high = low - beyond, high - beyond
    before = max(0, -low)
    return low + before, min(high + before, end)


def overlay(mask: Image.Image, original: Image.Image, painted: Image.Image, box: Box | None = None) -> Image.Image:
    """Blend a generated image over the original where the mask is white, partially where it is gray.

    box: the part of the original that was generated; the generated image is resized to it.
    """
    whole = painted
    if box is not None:
        wide, high = box[2] - box[0], box[3] - box[1]
        scaled_wide = wide if wide / high > painted.width / painted.height else painted.width * high // painted.height
        scaled_high = high if wide / high <= painted.width / painted.height else painted.height * wide // painted.width
        scaled = painted.resize((scaled_wide, scaled_high), Image.Resampling.LANCZOS)
        part = Image.new("RGB", (wide, high))
        part.paste(scaled, (wide // 2 - scaled_wide // 2, high // 2 - scaled_high // 2))
        whole = Image.new("RGB", original.size)
        whole.paste(part, box[:2])
    return Image.composite(whole, original.convert("RGB"), mask.convert("L"))


def _extended(image: Image.Image, mask: Image.Image, extend: Box, edge: int) -> tuple[Image.Image, Image.Image]:
    """Extend an image with a mirrored, blurred border; extend its mask to that border and `edge` pixels further in."""
    left, top, right, bottom = extend
    size = image.width + left + right, image.height + top + bottom
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"the extended image would be {_by(size)}; extend it less, or make it smaller first")
    sides = ((top, bottom), (left, right), (0, 0))
    mirrored = Image.fromarray(np.pad(np.asarray(image), sides, mode="symmetric"))
    new = Image.new("L", size, 255)
    new.paste(0, (left, top, left + image.width, top + image.height))
    border = mirrored.filter(ImageFilter.GaussianBlur(16))
    filled = Image.composite(border, mirrored, new)
    shifted = Image.new("L", size)
    shifted.paste(mask, (left, top))
    inner = [0 if not more else edge for more in extend]
    new = Image.new("L", size, 255)
    low, high = (left + inner[0], top + inner[1]), (size[0] - right - inner[2], size[1] - bottom - inner[3])
    if low[0] < high[0] and low[1] < high[1]:
        new.paste(0, (*low, *high))
    return filled, ImageChops.lighter(shifted, new)


def _soft(mask: Image.Image, edge: int) -> Image.Image:
    """Return an alpha mask: opaque where the mask is not black, fading over `edge` pixels to its rim in the image."""
    shrunk = mask.point(lambda level: 255 if level else 0)
    total = np.asarray(shrunk, dtype=np.float32)
    for _ in range(edge):
        shrunk = shrunk.filter(ImageFilter.MinFilter(3))
        total = total + np.asarray(shrunk)
    return Image.fromarray((total / (edge + 1)).round().astype(np.uint8))


def _enlarged(region: Size, size: Size, factor: int) -> Size:
    """Return the largest size with a region's aspect ratio that fits into `size`, in multiples of `factor`."""
    scale = min(size[0] / region[0], size[1] / region[1])
    wide, high = (max(factor, round(side * scale / factor) * factor) for side in region)
    return wide, high


def _padded(image: Image.Image, factor: int) -> Image.Image:
    """Pad to multiples of `factor`, an image by repeating its last rows and columns, a mask with black."""
    wide, high = (-side % factor for side in image.size)
    if not wide and not high:
        return image
    sides = ((0, high), (0, wide), (0, 0))[: np.asarray(image).ndim]
    how: Any = {"mode": "constant"} if image.mode == "L" else {"mode": "edge"}
    return Image.fromarray(np.pad(np.asarray(image), sides, **how))


def _filled(image: Image.Image, size: Size) -> Image.Image:
    """Resize an image to fit within a size, and fill the bars with its outermost rows or columns."""
    narrow = size[0] / size[1] < image.width / image.height
    wide = size[0] if narrow else max(1, image.width * size[1] // image.height)
    high = max(1, image.height * size[0] // image.width) if narrow else size[1]
    inner = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = size[0] // 2 - wide // 2, size[1] // 2 - high // 2
    whole = Image.new(image.mode, size)
    whole.paste(inner, (left, top))
    rims = [((0, 0, wide, 0), (0, 0)), ((0, high, wide, high), (0, top + high))] if top else []
    rims += [((0, 0, 0, high), (0, 0)), ((wide, 0, wide, high), (left + wide, 0))] if left else []
    for rim, place in rims:  # a box without height or width is one row or column, which the filter extends
        whole.paste(inner.resize((wide if top else left, top or high), box=rim), place)
    return whole


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


def _by(size: Size) -> str:
    return f"{size[0]} × {size[1]}"
