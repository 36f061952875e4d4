"""Images from files and URLs, and exporting animations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from PIL import Image

from sfumato import __version__
from sfumato.errors import DownloadError, OutputError, UsageError
from sfumato.files import replacing
from sfumato.images import open_image
from sfumato.values import reason, shown

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["export_to_gif", "load_image"]

# Maximum size of a downloaded image in bytes, and seconds to wait for a response.
MOST_BYTES, TIMEOUT = 2**26, 20.0


def load_image(
    image: str | PathLike[str] | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Load an image as upright RGB from a file, from an http or https URL, or from PIL.

    convert_method: a function to use instead of this conversion. Raises `UsageError` if the image cannot be read, and
    `DownloadError` if it cannot be downloaded.
    """
    if isinstance(image, Image.Image):
        return convert_method(image) if convert_method else image.convert("RGB")
    picture = _fetched(str(image)) if str(image).startswith(("http://", "https://")) else open_image(Path(image))
    return convert_method(picture) if convert_method else picture


def _fetched(address: str) -> Image.Image:
    try:
        request = Request(address, headers={"User-Agent": f"sfumato/{__version__}"})
        with urlopen(request, timeout=TIMEOUT) as answer:
            content = answer.read(MOST_BYTES + 1)
    except (URLError, OSError, ValueError) as error:
        raise DownloadError(f"{address} cannot be fetched ({reason(error)}); download it and pass the file") from error
    if len(content) > MOST_BYTES:
        raise DownloadError(f"{address} is larger than {MOST_BYTES // 2**20} MiB; download it and pass the file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            return open_image(path)
        except UsageError as error:
            raise UsageError(str(error).replace(str(path), address)) from error


def export_to_gif(
    image: Sequence[Image.Image], output_gif_path: str | PathLike[str] | None = None, fps: int = 10
) -> str:
    """Write images as an animation with `fps` frames per second; returns its path, by default a new temporary file.

    Raises `UsageError` without images, `OutputError` if the file cannot be written.
    """
    frames: list[Any] = list(image)
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise UsageError(f"export_to_gif takes a list of PIL images, not {shown(image)}")
    if output_gif_path is None:
        with tempfile.NamedTemporaryFile(suffix=".gif", delete=False) as file:
            output_gif_path = file.name
    path = Path(output_gif_path)
    try:
        with replacing(path) as temporary:
            how = {"append_images": frames[1:], "duration": round(1000 / fps), "loop": 0, "optimize": False}
            frames[0].save(temporary, "GIF", save_all=True, **how)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({reason(error)}); choose another path") from error
    return str(path)
