"""Images: tensors to files and back, and image grids."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager, suppress
from math import ceil, inf, log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from sfumato.errors import UsageError
from sfumato.files import expanded, open_file
from sfumato.values import reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = [
    "auto_grid",
    "fitted",
    "from_pixels",
    "make_image_grid",
    "open_image",
    "open_mask",
    "opened",
    "psnr",
    "size_notes",
    "to_arrays",
    "to_pictures",
    "to_pixels",
]

# An image with this many times the checkpoint's native pixels gets a note.
FAR_ABOVE = 4
# A larger input image is far more likely to be damaged or hostile.
MAX_PIXELS = 2**26
# Only formats that contain pixels. Others are programs, which Pillow hands to an interpreter (PostScript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def to_arrays(pixels: Tensor) -> np.ndarray:
    """Convert pixels (B, 3, H, W) in [0, 1] to a float32 array (B, H, W, 3)."""
    return pixels.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W) in [0, 1] to PIL images, rounded to 8 bits."""
    arrays = (to_arrays(pixels) * 255).round().astype(np.uint8)
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def from_pixels(sample: Tensor) -> Tensor:
    """Map decoded images, about [-1, 1], to [0, 1], clipped."""
    return (sample / 2 + 0.5).clamp(0, 1)


def to_pixels(
    image: Any,
    multiple: int,
    size: tuple[int, int] | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Tensor:
    """Convert an image in any common form to VAE input: (B, 3, H, W) float32 in [-1, 1].

    Accepts a PIL image, an array (H, W, 3) or (B, H, W, 3) in [0, 1], a tensor (3, H, W) or (B, 3, H, W) in [0, 1] or
    [-1, 1], or a list of one kind. PIL images are resized to `size` (width, height), or down to multiples of
    `multiple`. Raises `UsageError` for anything else.
    """
    import torch  # imported here, so that images can be read without it

    if isinstance(image, (list, tuple)):
        if not image:
            raise UsageError("image is an empty list; pass at least one image")
        parts = [to_pixels(one, multiple, size, resample) for one in image]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UsageError("the images of a batch differ in size; resize them to one")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        width, height = size or tuple(max(multiple, side - side % multiple) for side in image.size)
        picture = _rgb(image)
        if picture.size != (width, height):
            picture = picture.resize((width, height), resample)
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    if isinstance(image, np.ndarray):
        if image.dtype.kind != "f":
            raise UsageError(f"an image array must hold floating-point numbers in [0, 1], not {image.dtype}")
        batch = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        batch = batch[None] if batch.ndim == 3 else batch
        return _checked(batch.permute(0, 3, 1, 2) if batch.ndim == 4 else batch, multiple) * 2 - 1
    if isinstance(image, torch.Tensor):
        if not image.is_floating_point():
            raise UsageError(f"an image tensor must hold floating-point numbers, not {image.dtype}")
        batch = _checked(image[None] if image.ndim == 3 else image, multiple)
        return batch if batch.shape[1] == 4 or batch.min() < 0 else batch * 2 - 1
    raise UsageError(f"image must be a PIL image, an array, a tensor or a list of these, not {type(image).__name__}")


def _checked(batch: Tensor, multiple: int) -> Tensor:
    if batch.ndim != 4 or batch.shape[1] not in (3, 4) or not batch.numel():
        raise UsageError(f"an image array must have 3 channels, but its shape is {tuple(batch.shape)}")
    if batch.shape[1] == 3 and (batch.shape[2] % multiple or batch.shape[3] % multiple):
        raise UsageError(
            f"an image array's height and width must be divisible by {multiple}, not {tuple(batch.shape[2:])}"
        )
    return batch


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as upright RGB. Raises `UsageError` if it is missing, unreadable or too large."""
    with opened(path, FORMATS, "give a PNG, JPEG or WebP file") as image:
        with suppress(Exception):  # if the tag is damaged, the orientation is unknown
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def open_mask(path: str | Path) -> Image.Image:
    """Read a mask or depth map as 8-bit grayscale; transparent pixels become black. Raises `UsageError`."""
    with opened(path, FORMATS, "give a PNG, JPEG or WebP file") as image:
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        levels = _rgb(image).convert("L")
    return levels if alpha is None else ImageChops.multiply(levels, alpha)


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...], remedy: str) -> Iterator[Image.Image]:
    """Open an image in one of these formats without decoding it. Raises `UsageError` if anything is wrong."""
    place = expanded(path)
    if not os.path.lexists(place):
        raise UsageError(f"there is no image {path}; check the path")
    try:
        with warnings.catch_warnings(), open_file(place) as stream:
            warnings.simplefilter("ignore")  # about damaged tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UsageError(f"{path} is {image.width}×{image.height} pixels; make it smaller first")
                yield image
    except UsageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first") from error
    except Exception as error:  # decoders raise all kinds of exceptions
        what = "its format is not known" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UsageError(f"{path} cannot be read as an image ({what}); {remedy}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; 16-bit values keep their upper bits. Raises `UsageError` if white is undefined."""
    if image.mode == "F":
        raise UsageError("an image of floating-point values has no defined white; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values // 256 if wide else values).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the center of an image, cropped to the aspect ratio of `size` (width, height) and resized to it.

    Cropped pixels do not affect the edges. An image of that size is returned unchanged.
    """
    scale = min(image.width / size[0], image.height / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    middle = image.crop((left, top, left + width, top + height))
    return middle if middle.size == size else middle.resize(size, Image.Resampling.LANCZOS)


def size_notes(size: tuple[int, int], own: tuple[int, int], *, only: bool, source: bool, chosen: bool) -> list[str]:
    """Return notes if images of `size` (width, height) will be worse than, or different from, what a user may expect.

    own: the size the checkpoint was trained for. only: it supports no other. source: the size may come from an input
    image. chosen: the user set it.
    """
    this, best = f"{size[0]} × {size[1]}", f"{own[0]} × {own[1]}"
    if only and size != own:
        return [f"this model was made for {best} images, and {this} will look bad; use {best}"]
    if source and size[0] * size[1] > FAR_ABOVE * own[0] * own[1]:
        return [
            f"the image is {this}, far above the {best} that this model was trained for; a smaller width and height "
            "save time and look better"
        ]
    if source and not chosen and size != own:
        return [f"the output is {this}, as large as the input image; set width and height for the model's own {best}"]
    return []


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Arrange rows × cols images of the same size in a grid; `resize` first makes each a square of that size.

    Raises `UsageError` if the number of images is not rows × cols.
    """
    if len(images) != rows * cols or not images:
        raise UsageError(f"a grid of {rows} × {cols} needs {rows * cols} images, but there are {len(images)}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def auto_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images in a grid, as square as possible, with black for empty cells. A single image is unchanged."""
    if len(images) == 1:
        return images[0]
    cols = ceil(sqrt(len(images)))
    rows = ceil(len(images) / cols)
    blank = Image.new("RGB", images[0].size)
    return make_image_grid([*images, *[blank] * (rows * cols - len(images))], rows, cols)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images in dB. Raises `UsageError` if their sizes differ."""
    if a.size != b.size:
        raise UsageError(f"images of {a.width}×{a.height} and {b.width}×{b.height} pixels cannot be compared")
    difference = np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"), dtype=np.float64)
    error = float(np.mean(difference**2))
    return inf if error == 0 else 10 * log10(255**2 / error)
