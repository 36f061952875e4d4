"""Images for clients: other file formats, and sizes that suit a model."""

from __future__ import annotations

import io
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.server.errors import ApiError
from sfumato.server.intake import checked

if TYPE_CHECKING:
    from sfumato.jobs.models import Model

__all__ = ["converted", "fitting", "inverted", "painted"]


def converted(source: Path | bytes, kind: str, quality: int | None = None) -> bytes:
    """Return a generated image as "png", "jpeg" or "webp", with its recipe. quality: 0 to 100, for JPEG and WebP."""
    from PIL import Image

    from sfumato.metadata.carriers import image_bytes, read_carried

    if kind == "png":
        return source if isinstance(source, bytes) else source.read_bytes()
    recipe = None if isinstance(source, bytes) else read_carried(source, whole=False).recipe
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image_bytes(image.convert("RGB"), recipe, kind.upper(), quality)


def inverted(data: bytes) -> bytes:
    """Invert a mask. Raises `ApiError` if the data is not an image."""
    from PIL import Image, ImageOps

    checked(data, whole=True)
    with Image.open(io.BytesIO(data)) as image:
        ImageOps.invert(image.convert("L")).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def painted(mask: bytes, image: bytes) -> bytes:
    """Convert OpenAI's mask, which marks pixels to edit as transparent, to one that marks them as white.

    Raises `ApiError` if the sizes differ or no pixel is marked.
    """
    from PIL import Image, ImageOps

    for data in (mask, image):
        checked(data, whole=True)
    with Image.open(io.BytesIO(mask)) as found, Image.open(io.BytesIO(image)) as whole:
        if found.size != whole.size:
            told = f"the mask is {found.width}x{found.height}, and the image {whole.width}x{whole.height}"
            raise ApiError(400, f"{told}; send a mask of the image's size", param="mask")
        alpha = found.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        raise ApiError(400, "the mask has no transparent pixels; make the area to edit transparent", param="mask")
    ImageOps.invert(alpha).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def fitting(path: Path, model: Model) -> dict[str, Any]:
    """Return a width and height with the image's aspect ratio and about the model's default number of pixels.

    Empty if the model's default size is unknown.
    """
    from PIL import Image

    if model.width is None or model.height is None:
        return {}
    with Image.open(path) as image:
        width, height = image.size
    scale = sqrt(model.width * model.height / (width * height))
    step = 64 if model.width >= 512 else 8
    return {name: max(step, round(side * scale / step) * step) for name, side in (("width", width), ("height", height))}
