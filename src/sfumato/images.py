"""Pictures: between tensors and files, grids, and the recipe a PNG carries."""

from __future__ import annotations

import json
from math import ceil, inf, log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import OutputError, UsageError
from sfumato.files import output_folder, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "auto_grid",
    "fitted",
    "from_pixels",
    "make_image_grid",
    "next_free",
    "open_image",
    "psnr",
    "read_recipe",
    "save_png",
    "to_arrays",
    "to_pictures",
    "to_pixels",
]

RECIPE_KEY = "sfumato"
# A picture above this is far more likely a damaged or hostile file than one to draw from.
MAX_PIXELS = 2**27


def to_arrays(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [0, 1] -> float32 array (B, H, W, 3)."""
    return pixels.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [0, 1] -> PIL images, rounded to 8 bits."""
    arrays = (to_arrays(pixels) * 255).round().astype(np.uint8)
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def from_pixels(sample: Tensor) -> Tensor:
    """What the autoencoder decodes, about [-1, 1], to pixels in [0, 1]."""
    return (sample / 2 + 0.5).clamp(0, 1)


def to_pixels(image: Any, multiple: int, size: tuple[int, int] | None = None) -> Tensor:
    """A picture in any of its usual forms, as the autoencoder reads it: (B, 3, H, W) float32 in [-1, 1].

    Takes a PIL image, an array (H, W, 3) or (B, H, W, 3) in [0, 1], a tensor (3, H, W) or (B, 3, H, W) in [0, 1] or
    [-1, 1], or a list of one of these. PIL images are resized to `size` (width, height), or down to multiples of
    `multiple`. Raises `UsageError` for anything else.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise UsageError("image is an empty list; give at least one picture")
        parts = [to_pixels(one, multiple, size) for one in image]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UsageError("the images of a batch differ in size; resize them to one")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        width, height = size or tuple(max(multiple, side - side % multiple) for side in image.size)
        picture = image.convert("RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    if isinstance(image, np.ndarray):
        batch = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        batch = batch[None] if batch.ndim == 3 else batch
        return _checked(batch.permute(0, 3, 1, 2) if batch.ndim == 4 else batch, multiple) * 2 - 1
    if isinstance(image, torch.Tensor):
        batch = _checked(image[None] if image.ndim == 3 else image, multiple)
        return batch if batch.shape[1] == 4 or batch.min() < 0 else batch * 2 - 1
    raise UsageError(f"image must be a PIL image, an array, a tensor or a list of these, not {type(image).__name__}")


def _checked(batch: Tensor, multiple: int) -> Tensor:
    if batch.ndim != 4 or batch.shape[1] not in (3, 4):
        raise UsageError(f"an image array must have 3 channels, but its shape is {tuple(batch.shape)}")
    if batch.shape[1] == 3 and (batch.shape[2] % multiple or batch.shape[3] % multiple):
        raise UsageError(
            f"an image array's height and width must be divisible by {multiple}, not {tuple(batch.shape[2:])}"
        )
    return batch


def open_image(path: str | Path) -> Image.Image:
    """Read a picture file as RGB. Raises `UsageError` if it is missing, unreadable, or unreasonably large."""
    try:
        with Image.open(Path(path).expanduser()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(f"{path} is {image.width}×{image.height} pixels; make it smaller first")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"there is no picture {path}; check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as a picture ({error}); give a PNG, JPEG or WebP file") from error


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, cut to the shape of `size` (width, height) and resized to it; one of that size as it is.

    What is cut off leaves no trace at the edges.
    """
    scale = min(image.width / size[0], image.height / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    middle = image.crop((left, top, left + width, top + height))
    return middle if middle.size == size else middle.resize(size, Image.Resampling.LANCZOS)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Lay out rows × cols images of one size in a grid; `resize` makes each of them that many pixels square first.

    Raises `UsageError` if their number is not rows × cols.
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
    """All images in one grid, as square as their number allows, empty places black; one image stays itself."""
    if len(images) == 1:
        return images[0]
    cols = ceil(sqrt(len(images)))
    rows = ceil(len(images) / cols)
    blank = Image.new("RGB", images[0].size)
    return make_image_grid([*images, *[blank] * (rows * cols - len(images))], rows, cols)


def save_png(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> Path:
    """Write a PNG, with its recipe in a text chunk. Raises `OutputError`; the file is whole or absent."""
    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False, sort_keys=True), zip=True)
    output_folder(path.parent)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def next_free(path: Path) -> Path:
    """The path, or the first of `name-2.png`, `name-3.png`, … that does not exist yet."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe a PNG carries. Raises `UsageError` where there is none."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(RECIPE_KEY)
        recipe = json.loads(text) if text else None
    except FileNotFoundError as error:
        raise UsageError(f"there is no picture {path}; check the path") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a picture with a recipe ({error})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("request"), dict):
        raise UsageError(f"{path} carries no recipe; only PNGs that Sfumato wrote, unchanged since, can be replayed")
    return recipe


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB, infinite if equal. Raises `UsageError` if sizes differ."""
    if a.size != b.size:
        raise UsageError(f"pictures of {a.width}×{a.height} and {b.width}×{b.height} pixels cannot be compared")
    difference = np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"), dtype=np.float64)
    error = float(np.mean(difference**2))
    return inf if error == 0 else 10 * log10(255**2 / error)
