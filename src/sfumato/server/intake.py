"""Turns client input into requests: images become our files, names become paths, and nothing else is opened."""

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

# Of one image: bytes of its file, and pixels, which are counted before any of them is decoded.
MOST_BYTES, MOST_PIXELS = 50 * 10**6, 50 * 10**6
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
# What of a request stands for a file: images, which a client sends or names by key, and models of a kind by name.
FILES: dict[str, Any] = {
    "image": "image", "depth": "image", "refiner": "checkpoint", "mask": {"file": "image"},
    "adapters": {"file": "lora"}, "embeddings": {"file": "embedding"},
    "controls": {"model": "controlnet", "image": "image"},
    "image_prompts": {"model": "ip-adapter", "encoder": "image-encoder", "image": "image", "mask": "image"},
}  # fmt: skip
KEY = re.compile(r"[0-9a-f]{32}")
KEPT = re.compile(rf"{re.escape(HIDDEN)}/inputs/[0-9a-f]{{64}}\.(png|jpg|webp)")


def decoded(text: str) -> bytes:
    """The bytes of a data URL, or of base64 alone. Raises `ApiError`: an address is not fetched, nor a path opened."""
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, "images are sent as data URLs in base64 (data:image/png;base64,…); nothing is fetched")
    try:
        return base64.b64decode(rest if comma else head, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "an image is neither a data URL in base64 nor the key of an image here") from error


def checked(data: bytes, *, whole: bool = False) -> tuple[str, tuple[int, int]]:
    """The kind and size of an image file, from its header; if `whole`, all of it is looked at once these are fine.

    Raises `ApiError` for what is no image, broken or too large.
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
                    raise ApiError(400, "the image moves; send a single frame")
                if whole:
                    image.load()
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        raise ApiError(415, "this is no PNG, JPEG or WebP image") from error
    except Exception as error:  # decoders raise whatever happens to them
        status = 413 if isinstance(error, Image.DecompressionBombError) else 400
        raise ApiError(status, "the image cannot be read; make it smaller, or save it again") from error
    return kind, size


@contextmanager
def _written(data: bytes) -> Iterator[Path]:
    """An image that has been sent, as a file for as long as the block lasts."""
    kind, _ = checked(data)
    with tempfile.TemporaryDirectory(prefix="sfumato-") as folder:
        path = Path(folder) / f"the image{FORMATS[kind]}"
        path.write_bytes(data)
        yield path


class Intake:
    """Makes requests of what clients send. Images are kept in the folder, under their hash."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._inputs = output_folder(queue.folder / HIDDEN / "inputs")

    def request(self, values: dict[str, Any]) -> GenerateRequest:
        """The request that JSON stands for. Raises `UsageError` or `ApiError` naming what is wrong."""
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
        """The one that A1111 calls so, without its folder and whatever its capitals."""
        found = {one.name.rpartition("/")[2].lower(): one for one in self._queue.models.all() if one.kind == "lora"}
        return found[name.lower()].path if name.lower() in found else self._file(name, "lora")

    def image(self, text: str) -> str:
        """An image that a request brings or names, as the path of a file of ours, from the folder."""
        if KEY.fullmatch(text):
            if (path := self._queue.gallery.path_of(text)) is None:
                raise not_found("image", text)
            return self.keep(path.read_bytes())
        if KEPT.fullmatch(text):  # of a recipe of ours, sent again
            if not (self._queue.folder / text).is_file():
                raise ApiError(400, "the image that this one was made from is not here any more; send it again")
            return text
        return self.keep(decoded(text))

    def keep(self, data: bytes) -> str:
        """Keep an image; returns its path from the folder."""
        kind, _ = checked(data, whole=True)
        path = self._inputs / f"{hashlib.sha256(data).hexdigest()}{FORMATS[kind]}"
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        return path.relative_to(self._queue.folder).as_posix()

    def remembered(self, path: Path) -> dict[str, Any]:
        """What an image says of how it was drawn, with names of models in the place of paths, which are our business.

        Whatever was made from images that are not here is left out, and said.
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
                return file if kind == "image" else names.get(file, Path(file).stem)

            request[field] = _placed(request[field], FILES[field], name)
        if lost:
            lost |= {"mask"} if "image" in lost else set()
            notes.append("it was made from another image, which is not here; send that with it")
        told = {field: value for field, value in request.items() if field not in lost}
        return {"program": found.program, "request": told, "notes": notes, "fields": found.fields}

    def texts(self, data: bytes) -> dict[str, str]:
        """The texts that an image file carries, by keyword."""
        from sfumato.metadata.carriers import read_carried

        with _written(data) as path:
            carried = read_carried(path)
        said = {"parameters": carried.comments[0]} if carried.comments else {}
        return said | {key: str(value) for key, value in carried.texts.items()}

    def recipe(self, data: bytes) -> dict[str, Any]:
        """What the bytes of an image file say of how it was drawn."""
        _, size = checked(data)
        with _written(data) as path:
            told = self.remembered(path)
        if told["request"] is None:
            raise ApiError(400, "the image says nothing of how it was drawn that is known here", code="no_recipe")
        return {"width": size[0], "height": size[1], **told}


def _placed(value: Any, kinds: Any, put: Callable[[str, str], str]) -> Any:
    """JSON with `put(text, kind)` in the place of each text that stands for a file."""
    if isinstance(kinds, str):
        return put(value, kinds) if isinstance(value, str) else value
    if isinstance(value, list):
        return [_placed(one, kinds, put) for one in value]
    if not isinstance(value, dict):
        return value
    return value | {name: _placed(value[name], kind, put) for name, kind in kinds.items() if name in value}
