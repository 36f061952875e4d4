"""Reads the metadata of an image file, whichever program wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, UsageError
from sfumato.files import parse_json
from sfumato.metadata import a1111, comfyui, programs
from sfumato.metadata.carriers import Carried, read_carried
from sfumato.metadata.told import Told, request_of
from sfumato.request import GenerateRequest
from sfumato.values import reason

__all__ = ["Remembered", "remember"]

HASHES = re.compile(r'(?:"lora:)?([^,:"{}]{1,200})"?: *"?([0-9a-fA-F]{8,64})\b')


@dataclass(frozen=True)
class Remembered:
    """The settings in an image file.

    program: the one that wrote it; size: (width, height) in pixels; request: generates the image again, as far as
    possible; notes: what the request ignores; fields: all settings except the prompts; recipe: our own, if present.
    """

    program: str
    size: tuple[int, int]
    request: GenerateRequest
    notes: tuple[str, ...]
    fields: dict[str, str]
    recipe: dict[str, Any] | None = None

    @property
    def adapter_hashes(self) -> dict[str, str]:
        """The beginnings of the hashes of the adapters in the prompt, from A1111's and Civitai's fields."""
        told = f"{self.fields.get('Hashes', '')},{self.fields.get('Lora hashes', '')}"
        return {name.strip().lower(): sha256.lower() for name, sha256 in HASHES.findall(told)}


def remember(path: str | Path, carried: Carried | None = None) -> Remembered:
    """Read the settings in a PNG, JPEG, WebP or GIF file. carried: its metadata, if already read.

    Raises `UsageError` if the file is not an image or contains no settings in a known format.
    """
    carried = carried or read_carried(path)
    try:
        recipe = carried.recipe
        if recipe is not None and isinstance(recipe.get("request"), dict):
            request = GenerateRequest.from_dict(recipe["request"])
            model = recipe.get("model")
            fields = {"Model": str(model.get("name"))} if isinstance(model, dict) else {}
            notes = tuple(map(str, told)) if isinstance(told := recipe.get("notes"), list) else ()
            return Remembered("Sfumato", carried.size, request, notes, fields, recipe)
    except (CheckpointError, UsageError) as error:
        raise UsageError(f"the recipe of {path} cannot be read: {reason(error)}") from error
    told = next((told for told in _told(carried) if told is not None), None)
    if told is None:
        raise UsageError(
            f"{path} contains no recipe of Sfumato or of another known program; use the file as that program wrote it"
        )
    request, notes = request_of(told)
    if request.width is None:
        request = request.replace(width=carried.size[0], height=carried.size[1])
    return Remembered(told.program, carried.size, request, tuple(notes), dict(told.fields))


def _told(carried: Carried) -> Iterator[Told | None]:
    """Yield the settings from each place in the file: the most reliable first, and EXIF before texts, as in A1111."""
    texts, xmp = carried.texts, carried.xmp
    for text in (*carried.comments, texts.get("parameters"), xmp.get("parameters"), xmp.get("UserComment")):
        if text:
            yield _of_text(text, texts, xmp)
    invoke = _json(texts.get("invokeai_metadata")) or _json(texts.get("sd-metadata")).get("image")
    if isinstance(invoke, dict) and invoke:
        yield programs.invoke(invoke)
    if texts.get("Dream"):
        yield programs.dream(texts["Dream"])
    if texts.get("Software") == "NovelAI":
        yield programs.novel(_json(texts.get("Comment")), texts.get("Description", ""))
    if graph := _json(texts.get("prompt")):
        yield comfyui.parse(graph)
    # Try the description last.
    yield a1111.parse(texts.get("Description") or xmp.get("description") or "")


def _of_text(text: str, texts: Any, xmp: Any) -> Told | None:
    """Parse a comment: A1111's lines, or the JSON that other programs write in the same place."""
    told = _json(text)
    if not told:
        return a1111.parse(text)
    if isinstance(params := told.get("sui_image_params"), dict):
        return programs.swarm(params)
    if "fooocus_scheme" in texts or told.get("metadata_scheme") == "fooocus":
        return programs.fooocus(told)
    if xmp.get("CreatorTool") == "Draw Things" or {"c", "uc", "sampler"} <= told.keys():
        return programs.draw_things(told)
    if {"uc", "sampler", "steps"} <= told.keys():
        return programs.novel(told, texts.get("Description", ""))
    return comfyui.parse(told)


def _json(text: str | None) -> dict[str, Any]:
    if not text or not text.lstrip().startswith("{"):
        return {}
    try:
        return parse_json(text, "metadata")
    except CheckpointError:
        return {}
