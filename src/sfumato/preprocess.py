"""Control images: fitted to the output size, and made from a photo without a model.

OpenCV is imported only where a preprocessor needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sfumato.errors import MissingExtra, UsageError
from sfumato.images import fitted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["control_image", "control_pixels", "prepare"]

Pixels = np.ndarray[Any, Any]
# The thresholds and radii that ControlNets were trained with, or that are customary.
CANNY, XDOG, LINEART, BINARY = (100, 200), 32, 6.0, 127
SOFT, BLUR, TILE = 1.5, 9.0, 2
# Aspect ratios closer than this count as equal: rounding a size may lose a pixel.
SAME_SHAPE = 0.01


def control_image(
    image: Image.Image, size: tuple[int, int], how: str, preprocessor: str
) -> tuple[Image.Image, str | None]:
    """Preprocess an image for a ControlNet at `size` (width, height); also return a note if its aspect ratio differed.

    how: "crop" keeps the center, "pad" adds black borders after preprocessing, "stretch" distorts it.
    """
    shape, wanted = image.width / image.height, size[0] / size[1]
    differs = abs(shape / wanted - 1) > SAME_SHAPE
    words = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}[how]
    note = f"{image.width} × {image.height} was {words} to {size[0]} × {size[1]}" if differs else None
    if how == "crop":
        return prepare(preprocessor, fitted(image, size)), note
    inner = size
    if how == "pad" and differs:
        scale = min(size[0] / image.width, size[1] / image.height)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = prepare(preprocessor, image.resize(inner, Image.Resampling.LANCZOS))
    if inner == size:
        return picture, note
    whole = Image.new("RGB", size)
    whole.paste(picture, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return whole, note


def prepare(name: str, image: Image.Image) -> Image.Image:
    """Apply one of `request.PREPROCESSORS` to an RGB image; the size does not change.

    Raises `MissingExtra` if OpenCV is needed and not installed.
    """
    if name == "none":
        return image
    pixels = np.asarray(image.convert("RGB"))
    made = {"invert": _invert, "threshold": _threshold}.get(name)
    result = made(pixels) if made is not None else _BY_OPENCV[name](pixels, _opencv())
    return Image.fromarray(result if result.ndim == 3 else np.repeat(result[..., None], 3, axis=2))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("this preprocessor needs OpenCV; install it with pip install 'sfumato[control]'") from error
    return cv2


def _invert(pixels: Pixels) -> Pixels:
    """Invert black drawings on white."""
    return 255 - pixels


def _threshold(pixels: Pixels) -> Pixels:
    return np.where(pixels.min(axis=2) > BINARY, 255, 0).astype(np.uint8)


def _canny(pixels: Pixels, cv2: Any) -> Pixels:
    """Detect thin edges ("A Computational Approach to Edge Detection", Canny 1986)."""
    return cv2.Canny(pixels, *CANNY)


def _scribble(pixels: Pixels, cv2: Any) -> Pixels:
    """Detect broad strokes: a thresholded difference of Gaussians (XDoG, Winnemöller 2012)."""
    fine, coarse = (cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), sigma) for sigma in (0.5, 5.0))
    lines = (coarse - fine).min(axis=2).clip(0, 255)
    return np.where(2 * lines > XDOG, 255, 0).astype(np.uint8)


def _lineart(pixels: Pixels, cv2: Any) -> Pixels:
    """Extract what is darker than its surroundings, scaled so that the median line is mid-gray."""
    wide = pixels.astype(np.float32)
    lines = (cv2.GaussianBlur(wide, (0, 0), LINEART) - wide).min(axis=2).clip(0, 255)
    strong = lines[lines > 8]
    middle = max(16.0, float(np.median(strong)) if strong.size else 0.0)
    return (127 * lines / middle).clip(0, 255).astype(np.uint8)


def _softedge(pixels: Pixels, cv2: Any) -> Pixels:
    """Compute the gradient's magnitude after a slight blur, with the steepest hundredth in white."""
    grey = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), SOFT)
    steep = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return (255 * steep / max(1.0, float(np.percentile(steep, 99)))).clip(0, 255).astype(np.uint8)


def _tile(pixels: Pixels, cv2: Any) -> Pixels:
    """Halve the resolution and scale back to the same size."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(1, width // TILE), max(1, height // TILE)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _blur(pixels: Pixels, cv2: Any) -> Pixels:
    return cv2.GaussianBlur(pixels, (0, 0), BLUR)


def _recolor(pixels: Pixels, cv2: Any) -> Pixels:
    """Return the lightness."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[..., 0]


_BY_OPENCV = {
    "canny": _canny,
    "scribble": _scribble,
    "lineart": _lineart,
    "softedge": _softedge,
    "tile": _tile,
    "blur": _blur,
    "recolor": _recolor,
}


def control_pixels(image: Any, size: tuple[int, int] | None = None) -> Tensor:
    """Convert control images to network input: (B, 3, H, W) float32, in [0, 1] for PIL images.

    Accepts PIL images, arrays (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), whose values are unchanged,
    or a list of one kind; all are resized to `size` (width, height). Raises `UsageError` for anything else.
    """
    if isinstance(image, (list, tuple)):
        parts = [control_pixels(one, size) for one in image]
        if not parts or len({part.shape[1:] for part in parts}) > 1:
            raise UsageError(
                "control images must be of one size, and at least one; resize them, or give width and height"
            )
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        picture = image.convert("RGB")
        if size is not None and picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    if not isinstance(image, torch.Tensor) or image.ndim not in (3, 4) or not image.is_floating_point():
        raise UsageError("a control image must be a PIL image, an array or tensor of floating-point numbers, or a list")
    batch = image[None] if image.ndim == 3 else image
    if size is not None and (batch.shape[3], batch.shape[2]) != size:
        batch = torch.nn.functional.interpolate(batch, size=size[::-1])
    return batch.float()
