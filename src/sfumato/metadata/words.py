"""The keys of A1111's parameters and the matching request fields, in one table for reading and writing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from sfumato.metadata.names import names
from sfumato.metadata.samplers import by_name
from sfumato.request import FreeU, GenerateRequest, GuidanceInterval, Hires, Record

__all__ = ["OURS", "read_field", "written"]

# Defaults for our own texts.
OURS = GenerateRequest(prompt_syntax="a1111")


def _record(kind: Any) -> Callable[[str], Any]:
    """Return a parser for records in the form "b1: 1.5, b2: 1.6"."""
    return lambda text: kind.from_dict({name: float(value) for name, value in re.findall(r"(\w+): ([^,]+)", text)})


SOURCES = {"CPU": "torch", "NV": "cuda", "NumPy": "numpy", "GPU": "cuda", "cpu": "torch", "cuda": "cuda"}
# Fields that need only a type or a table of words, in the order in which they are written. Keys and words are A1111's,
# if it has any.
PLAIN: Mapping[str, tuple[str, Any]] = {
    "Steps": ("steps", int), "CFG scale": ("guidance_scale", float), "Seed": ("seed", int),
    "Variation seed": ("noise.variation_seed", int), "Variation seed strength": ("noise.variation_strength", float),
    "Negative clip skip": ("negative_clip_skip", int), "ENSD": ("noise.step_seed", int), "RNG": ("rng", SOURCES),
    "Step RNG": ("noise.step_rng", SOURCES), "Eta DDIM": ("eta", float), "CFG rescale": ("guidance_rescale", float),
    "Emphasis": ("prompt_syntax", {"None": "plain", "Original": "a1111"}), "Prompt syntax": ("prompt_syntax", str),
    "Scheduler": ("scheduler", str), "Spacing": ("spacing", str), "Tiling": ("seamless", {"True": "xy", "False": None}),
    "Seamless": ("seamless", str), "FreeU": ("freeu", _record(FreeU)),
    "Guidance interval": ("guidance_interval", _record(GuidanceInterval)), "Hires upscale": ("hires.scale", float),
    "Hires steps": ("hires.steps", int), "Hires upscaler": ("hires.upscaler", names()["upscalers"]),
    "Hires CFG Scale": ("hires.guidance_scale", float), "Hires prompt": ("hires.prompt", str),
    "Hires negative prompt": ("hires.negative_prompt", str), "Hires scheduler": ("hires.scheduler", str),
    "Hires spacing": ("hires.spacing", str),
}  # fmt: skip


def written(one: GenerateRequest, size: tuple[int, int], also: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a request for one image of this size, except its prompts, by A1111's keys, in A1111's order.

    also: A1111's values for "Sampler", "Schedule type", "Model" and "Lora hashes".
    """
    one, hires = one.settled({}), one.hires
    fields = {
        "Steps": one.steps, "Sampler": also.get("Sampler"),
        "Schedule type": (one.spacing or "").replace("_", " ").title() or also.get("Schedule type"),
        "CFG scale": one.guidance_scale, "Seed": one.seed, "Size": f"{one.width or size[0]}x{one.height or size[1]}",
        **{key: also.get(key) for key in ("Model", "Lora hashes")}, "RNG": _text(one.rng, SOURCES),
        "Denoising strength": None if one.image is None else one.chosen_strength,
        "Clip skip": None if one.clip_skip is None else one.clip_skip + 1,
    }  # fmt: skip
    if hires is not None:
        sampler = by_name(hires.scheduler or "", None)[0]
        fields |= {"Denoising strength": hires.strength, "Hires sampler": sampler and sampler.a1111}
        fields |= {"Hires upscaler": _text(hires.upscaler, names()["upscalers"]), "Hires upscale": hires.scale}
        sides = f"{hires.width or 0}x{hires.height or 0}"
        fields["Hires resize"] = None if sides == "0x0" else sides
    base = OURS if hires is None else OURS.replace(hires=Hires())
    for key, (path, kind) in PLAIN.items():
        value = None if hires is None and path.startswith("hires.") else attrgetter(path)(one)
        if value is not None and value != attrgetter(path)(base):
            fields[key] = _text(value, kind)
    return {key: value for key, value in fields.items() if value not in (None, "")}


def _text(value: Any, kind: Any) -> Any:
    """Convert a value to text: its first word in a table, or the numbers of a record."""
    if isinstance(value, Record):
        return ", ".join(f"{name}: {one}" for name, one in vars(value).items() if one is not None)
    return next((word for word, one in kind.items() if one == value), None) if isinstance(kind, dict) else value


def read_field(key: str, value: str, request: GenerateRequest, told: Any) -> GenerateRequest:
    """Set one field in a request. Raises `KeyError` if the key is unknown, and `ValueError` if the value is wrong.

    told: the `Told` that the field is from.
    """
    if key in SPECIAL:
        return SPECIAL[key](value, request, told)
    path, kind = PLAIN[key]
    return _placed(request, path, kind[value] if isinstance(kind, dict) else kind(value))


def _placed(request: GenerateRequest, path: str, value: Any) -> GenerateRequest:
    """Set a value in a request at a path such as "noise.step_seed"."""
    first, _, last = path.partition(".")
    return request.replace(**{first: getattr(request, first).replace(**{last: value}) if last else value})


def _strength(value: str, request: GenerateRequest, told: Any) -> GenerateRequest:
    strength, steps = float(value), request.chosen_steps
    if not 0 <= strength <= 1:
        raise ValueError(value)
    if request.hires is not None:
        return _placed(request, "hires.strength", max(strength, 0.01))
    return request.replace(**told.strengths(strength, steps))


def _size(value: str) -> list[int]:
    return [int(side) for side in re.split(" ?[x×] ?", value)]


def _clip_skip(value: str, request: GenerateRequest, told: Any) -> GenerateRequest:
    """A1111's value includes the last layer and applies to both prompts."""
    layers = int(value) - 1
    return request.replace(clip_skip=layers, negative_clip_skip=None if told.ours else layers) if layers else request


def _off(value: str, request: GenerateRequest, _: Any) -> GenerateRequest:
    """Accept only values that have no effect."""
    if value.strip().lower() not in ("0", "0.0", "false", "none", "1", "1.0"):
        raise ValueError(value)
    return request


def _resized(value: str, request: GenerateRequest, _: Any) -> GenerateRequest:
    width, height = _size(value)
    return _placed(_placed(request, "hires.width", width or None), "hires.height", height or None)


def _sampler(value: str, request: GenerateRequest, told: Any) -> GenerateRequest:
    """Set the sampler of the second pass, with the first pass's schedule by default. Our own texts use other keys."""
    if told.ours:
        return request
    fields = {key.lower(): one for key, one in told.fields.items()}
    name, schedule = (fields.get(f"hires {key}", fields.get(key)) for key in ("sampler", "schedule type"))
    sampler, spacing = by_name(name or "", schedule)
    if sampler is None or (spacing is None and sampler.spacing is not None):
        raise ValueError(value)
    return _placed(_placed(request, "hires.scheduler", sampler.name), "hires.spacing", spacing)


def _sized(value: str, request: GenerateRequest, told: Any) -> GenerateRequest:
    """Set the image size. In A1111's first versions it is the size of the second pass."""
    width, height = _size(value)
    if "First pass size" in told.fields:
        request = _resized(value, request, told)
        width, height = _size(told.fields["First pass size"])
    return request.replace(width=width, height=height)


SPECIAL: Mapping[str, Callable[[str, GenerateRequest, Any], GenerateRequest]] = {
    "Size": _sized, "Clip skip": _clip_skip, "Denoising strength": _strength, "Hires resize": _resized,
    "Hires sampler": _sampler, "Hires schedule type": _sampler,
    "Hires steps": lambda value, request, _: _placed(request, "hires.steps", int(value) or None),
    "ENSD": lambda value, request, told: _placed(request, "noise.step_seed", int(value)) if int(value) or told.ours
    else request,
    # A1111 applies guidance strictly after this fraction of the steps, Sfumato from the fraction on.
    "Skip Early CFG": lambda value, request, _: request.replace(
        guidance_interval=GuidanceInterval(start=math.nextafter(float(value), 1))),
} | dict.fromkeys(("Face restoration", "Token merging ratio", "Token merging ratio hr", "Eta"), _off)  # fmt: skip
