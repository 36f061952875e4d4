"""Turns client input into requests: images are stored, names are resolved to paths, and nothing else is opened."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.errors import UsageError
from sfumato.files import output_folder, replacing
from sfumato.jobs.gallery import HIDDEN
from sfumato.request import AdapterFile, GenerateRequest
from sfumato.server.errors import ApiError, not_found
from sfumato.text.grammars import named_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.jobs.queue import JobQueue

__all__ = ["MOST_BYTES", "MOST_PIXELS", "Intake", "checked", "decoded"]

# Limits for one image: file size in bytes, and pixels, which are checked before decoding.
MOST_BYTES, MOST_PIXELS = 50 * 10**6, 50 * 10**6
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
# Request fields that stand for files. Clients send images or name them by key; they name models by kind and name.
FILES: dict[str, Any] = {
    "image": "image", "depth": "image", "refiner": "checkpoint", "vae": "vae", "mask": {"file": "image"},
    "adapters": {"file": "lora"}, "embeddings": {"file": "embedding"},
    "controls": {"model": "controlnet", "image": "image"},
    "image_prompts": {"model": "ip-adapter", "encoder": "image-encoder", "image": "image", "mask": "image"},
}  # fmt: skip
KEY = re.compile(r"[0-9a-f]{32}")
KEPT = re.compile(rf"{re.escape(HIDDEN)}/inputs/[0-9a-f]{{64}}\.(png|jpg|webp)")


def decoded(text: str) -> bytes:
    """Decode a data URL or plain base64. Raises `ApiError` for anything else: nothing is fetched, no path is opened."""
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, "send images as base64 data URLs (data:image/png;base64,…); URLs are not fetched")
    try:
        return base64.b64decode(rest if comma else head, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "an image must be a base64 data URL or the key of an image on this server") from error


def checked(data: bytes, *, whole: bool = False) -> tuple[str, tuple[int, int]]:
    """Return the format and size of an image file, read from its header. If `whole`, also decode all of it.

    Raises `ApiError` if the data is not an image, or is broken or too large.
    """
    import io

    from PIL import Image, UnidentifiedImageError

    if len(data) > MOST_BYTES:
        raise ApiError(413, f"the image has {len(data)} bytes; send at most {MOST_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
                kind, size = str(image.format), image.size
                if size[0] * size[1] > MOST_PIXELS:
                    told = f"the image has {size[0]} × {size[1]} pixels; send at most {MOST_PIXELS // 10**6} million"
                    raise ApiError(413, told)
                if getattr(image, "n_frames", 1) > 1:
                    raise ApiError(400, "the image is animated; send a single frame")
                if whole:
                    image.load()
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        raise ApiError(415, "this is not a PNG, JPEG or WebP image") from error
    except Exception as error:  # decoders raise errors of any type
        status = 413 if isinstance(error, Image.DecompressionBombError) else 400
        raise ApiError(status, "the image cannot be read; make it smaller, or save it again") from error
    return kind, size


@contextmanager
def _written(data: bytes) -> Iterator[Path]:
    """Write uploaded image data to a temporary file that exists only within the block."""
    kind, _ = checked(data)
    with tempfile.TemporaryDirectory(prefix="sfumato-") as folder:
        path = Path(folder) / f"the image{FORMATS[kind]}"
        path.write_bytes(data)
        yield path


class Intake:
    """Creates requests from client input. Stores images in the output folder, named by their hash."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._inputs = output_folder(queue.folder / HIDDEN / "inputs")

    def request(self, values: dict[str, Any]) -> GenerateRequest:
        """Create a request from JSON values. Raises `UsageError` or `ApiError`, which name the wrong value."""
        if values.get("lora_dir") is not None:
            raise ApiError(400, "lora_dir names a folder of the server; list adapters by name in adapters instead")
        given = {name: value for name, value in values.items() if value is not None}
        request = GenerateRequest.from_dict(_placed(given, FILES, self._file))
        if request.prompt_syntax != "a1111" or not isinstance(request.prompt, str):
            return request
        prompt, named = named_adapters(request.prompt)
        files = tuple(
            AdapterFile(file=self._lora(name), weight=weight, text_weight=None if text == weight else text)
            for name, weight, text in named
        )
        return request.replace(prompt=prompt, adapters=(*request.adapters, *files))

    def _file(self, text: str, kind: str) -> str:
        return self.image(text) if kind == "image" else self._queue.models.get(text, kind).path

    def _lora(self, name: str) -> str:
        """Return the path of a LoRA by its name in A1111: without the folder, and ignoring case."""
        found = {one.name.rpartition("/")[2].lower(): one for one in self._queue.models.all() if one.kind == "lora"}
        return found[name.lower()].path if name.lower() in found else self._file(name, "lora")

    def image(self, text: str) -> str:
        """Return the stored path, relative to the output folder, of an image that a request contains or names."""
        if KEY.fullmatch(text):
            if (path := self._queue.gallery.path_of(text)) is None:
                raise not_found("image", text)
            return self.keep(path.read_bytes())
        if KEPT.fullmatch(text):  # the path in one of our recipes, sent back
            if not (self._queue.folder / text).is_file():
                raise ApiError(400, "the input image of this recipe is no longer here; send it again")
            return text
        return self.keep(decoded(text))

    def keep(self, data: bytes) -> str:
        """Store an image. Returns its path relative to the output folder."""
        kind, _ = checked(data, whole=True)
        path = self._inputs / f"{hashlib.sha256(data).hexdigest()}{FORMATS[kind]}"
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        return path.relative_to(self._queue.folder).as_posix()

    def remembered(self, path: Path) -> dict[str, Any]:
        """Return the settings stored in an image, with model names instead of this server's paths.

        Fields that refer to images this server does not have are dropped, with a note.
        """
        from sfumato.metadata.remember import remember

        try:
            found = remember(path)
        except UsageError as error:
            return {"request": None, "notes": [str(error)], "fields": {}}
        names, notes = {one.path: one.name for one in self._queue.models.all()}, list(found.notes)
        request, lost = found.request.to_dict(), set[str]()
        for field in [one for one in FILES if one in request]:

            def name(file: str, kind: str, field: str = field) -> str:
                lost.update({field} if kind == "image" and not KEPT.fullmatch(file) else ())
                known = kind == "image" or file.startswith(f"{BUILT_IN}/")
                return file if known else names.get(file, Path(file).stem)

            request[field] = _placed(request[field], FILES[field], name)
        if lost:
            lost |= {"mask"} if "image" in lost else set()
            notes.append("it was made from another image, which is not on this server; send that image too")
        told = {field: value for field, value in request.items() if field not in lost}
        return {"program": found.program, "request": told, "notes": notes, "fields": found.fields}

    def texts(self, data: bytes) -> dict[str, str]:
        """Return the metadata texts of an image file, by keyword."""
        from sfumato.metadata.carriers import read_carried

        with _written(data) as path:
            carried = read_carried(path)
        said = {"parameters": carried.comments[0]} if carried.comments else {}
        return said | {key: str(value) for key, value in carried.texts.items()}

    def recipe(self, data: bytes) -> dict[str, Any]:
        """Return the image's size and the settings stored in it. Raises `ApiError` if it contains none."""
        _, size = checked(data)
        with _written(data) as path:
            told = self.remembered(path)
        if told["request"] is None:
            raise ApiError(400, "the image contains no settings in a known format", code="no_recipe")
        return {"width": size[0], "height": size[1], **told}


def _placed(value: Any, kinds: Any, put: Callable[[str, str], str]) -> Any:
    """Return the JSON value with each text that stands for a file replaced by `put(text, kind)`."""
    if isinstance(kinds, str):
        return put(value, kinds) if isinstance(value, str) else value
    if isinstance(value, list):
        return [_placed(one, kinds, put) for one in value]
    if not isinstance(value, dict):
        return value
    return value | {name: _placed(value[name], kind, put) for name, kind in kinds.items() if name in value}
