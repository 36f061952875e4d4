"""The texts in image files: reads those of any program, and writes them so that other programs can read them."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo, iTXt

from sfumato.errors import OutputError, UsageError
from sfumato.files import add_file, output_folder, parse_json, replacing
from sfumato.images import opened
from sfumato.metadata import xmp
from sfumato.metadata.a1111 import parameters
from sfumato.metadata.formats import format_of
from sfumato.values import reason

__all__ = ["RECIPE_KEY", "Carried", "image_bytes", "read_carried", "read_recipe", "save_new_picture", "save_picture"]

Recipe = dict[str, Any] | None

RECIPE_KEY = "sfumato"
# Far more than any program writes about an image, even a whole node graph.
MOST_TEXT = 2**22
# EXIF's UserComment begins with eight bytes that name its encoding.
UNICODE, ASCII, UNSAID = b"UNICODE\0", b"ASCII\0\0\0", bytes(8)


@dataclass(frozen=True)
class Carried:
    """The metadata of an image file: its size in pixels, PNG texts by keyword, comments, and XMP fields.

    comments: EXIF's UserComment, followed by the comment of a JPEG or GIF file.
    """

    size: tuple[int, int]
    texts: Mapping[str, str]
    comments: tuple[str, ...]
    xmp: Mapping[str, str]

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Our own recipe, if there is one. Raises `CheckpointError` if it is not a JSON object."""
        text = self.texts.get(RECIPE_KEY) or self.xmp.get("recipe")
        return parse_json(text, "its recipe") if text else None


def read_carried(path: str | Path, *, whole: bool = True) -> Carried:
    """Read the metadata of a PNG, JPEG, WebP or GIF file; unless `whole`, only the part before the pixels.

    Raises `UsageError` if the file is missing, damaged or not an image, or if its texts are unreasonably long.
    """
    with opened(path, ("PNG", "JPEG", "WEBP", "GIF"), "give the file as the program wrote it") as image:
        if whole:
            image.load()
        found = getattr(image, "text", {}) if whole else image.info if image.format == "PNG" else {}
        texts = {str(key): _mended(value) for key, value in found.items() if isinstance(value, str)}
        packet = texts.pop("XML:com.adobe.xmp", None) or image.info.get("xmp") or ""
        packet = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
        said = [_user_comment(image), image.info.get("comment")]
        comments = [one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in said if one]
        if sum(map(len, (*texts.values(), *comments, packet))) > MOST_TEXT:
            raise UsageError(f"{path} contains too much metadata to read; use the file as the program wrote it")
        return Carried(image.size, texts, tuple(comments), xmp.fields_of(packet))


def _mended(text: str) -> str:
    """Correct the encoding of a PNG text: several programs write UTF-8 where the standard requires Latin-1."""
    if isinstance(text, iTXt) or text.isascii():
        return str(text)
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _user_comment(image: Image.Image) -> str | None:
    try:
        value = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # Pillow raises errors of any type for damaged tags
        return None
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else None
    code, text = value[:8], value[8:]
    if code == UNICODE:
        # The byte order is independent of the surrounding tags. The zero bytes of ASCII letters reveal it.
        big = text[0::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", "replace")
    return (text if code in (ASCII, UNSAID) else value).decode("utf-8", "replace").rstrip("\0")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the recipe in an image that Sfumato wrote. Raises `UsageError` if there is none."""
    try:
        recipe = read_carried(path).recipe
    except OSError as error:
        raise UsageError(f"{path} has a damaged recipe ({reason(error)}); give the file as Sfumato wrote it") from error
    if recipe is None or not isinstance(recipe.get("request"), dict):
        raise UsageError(f"{path} contains no recipe; only unmodified images written by Sfumato have one")
    return recipe


def save_picture(image: Image.Image, path: Path, recipe: Recipe = None) -> Path:
    """Write a PNG, JPEG or lossless WebP, chosen by the extension, with its recipe, A1111's text and XMP.

    Writes atomically. Raises `OutputError`.
    """
    kind = format_of(path)
    output_folder(path.parent)
    with replacing(path) as temporary:
        _write(image, temporary, kind, recipe)
    return path


def save_new_picture(image: Image.Image, path: Path, recipe: Recipe = None) -> Path:
    """Like `save_picture`, but use the first free name of `name.png`, `name-2.png`, …, and return it."""
    kind = format_of(path)
    output_folder(path.parent)
    return add_file(path, lambda temporary: _write(image, temporary, kind, recipe))


def image_bytes(image: Image.Image, recipe: Recipe = None, kind: str = "PNG", quality: int | None = None) -> bytes:
    """Encode a PNG, JPEG or WebP with the same metadata as `save_picture`.

    quality: of a JPEG or lossy WebP, 0 to 100.
    """
    _write(image, stream := io.BytesIO(), kind, recipe, quality)
    return stream.getvalue()


def _write(image: Image.Image, path: Path | io.BytesIO, kind: str, recipe: Recipe, quality: int | None = None) -> None:
    best = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    options: dict[str, Any] = dict(best.get(kind, {})) if quality is None else {"quality": quality}
    if recipe is not None:
        options |= _in_png(recipe, image.size) if kind == "PNG" else _in_exif(recipe, image.size)
    try:
        image.save(path, format=kind, **options)
    except ValueError as error:
        raise OutputError(f"the recipe is too long for {kind} ({reason(error)}); use PNG instead") from error


def _in_png(recipe: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    info, text = PngInfo(), parameters(recipe, size)
    # A chunk for text that is not ASCII names its encoding, so that no reader has to guess.
    (info.add_text if text.isascii() and "\0" not in text else info.add_itxt)("parameters", text)
    info.add_itxt("XML:com.adobe.xmp", _packet(recipe))
    info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False, sort_keys=True), zip=True)
    return {"pnginfo": info}


def _in_exif(recipe: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    comment = UNICODE + parameters(recipe, size).encode("utf-16-be", "surrogatepass")
    return {"exif": _exif(comment), "xmp": _packet(recipe, json.dumps(recipe, sort_keys=True)).encode()}


def _packet(recipe: dict[str, Any], told: str | None = None) -> str:
    request, versions = (one if isinstance(one := recipe.get(key), dict) else {} for key in ("request", "versions"))
    prompt, composed = request.get("prompt", ""), request.get("image") is not None
    prompt = "; ".join(map(str, prompt)) if isinstance(prompt, list | tuple) else str(prompt)
    return xmp.packet(prompt, composed=composed, version=str(versions.get("sfumato", "")), recipe=told)


def _exif(comment: bytes) -> bytes:
    """Return EXIF data with only a UserComment. Pillow would write it with a type other than the standard's (7)."""
    first = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)  # a directory that points to the second one
    second = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + first + second + comment
