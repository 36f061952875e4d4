"""JSON metadata of InvokeAI, Fooocus, SwarmUI, NovelAI and Draw Things."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfumato.metadata.comfyui import COMFYUI_BASE
from sfumato.metadata.names import names
from sfumato.metadata.samplers import by_invoke
from sfumato.metadata.told import A1111_BASE, Told
from sfumato.request import GenerateRequest, Noise

__all__ = ["draw_things", "dream", "fooocus", "invoke", "novel", "swarm"]

# Their names for A1111's keys; names that are handled separately below; names that are handled only in part.
NAMES, KNOWN, PARTLY = names()["fields"], frozenset(names()["known"]), names()["partly"]


def _fields(told: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the fields by A1111's keys, and a note for each value without such a key."""
    fields = {key: _word(told[name]) for name, key in NAMES.items() if told.get(name) is not None}
    nothing = (None, "", 0, False, [], {}, "None", "Default (model)")
    names = [name for name, value in told.items() if value not in nothing and name not in (NAMES.keys() | KNOWN)]
    names += [name for name in PARTLY if told.get(name) not in nothing]
    if told.get("width") and told.get("height"):
        fields["Size"] = f"{told['width']}x{told['height']}"
    return fields, [f"{name} is ignored: {_word(told[name])[:100]}" for name in names]


def _word(value: Any) -> str:
    if isinstance(value, dict):  # a model: use its name
        value = next((value[key] for key in ("model_name", "name", "model") if key in value), value)
    return str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def invoke(told: Mapping[str, Any]) -> Told:
    """Read InvokeAI's `invokeai_metadata`, or the `image` of its older `sd-metadata`."""
    fields, notes = _fields(told)
    name = _text(told.get("scheduler") or told.get("sampler") or told.get("sampler_name"))
    if known := by_invoke(name):
        fields.pop("Sampler", None)
        fields["Scheduler"] = known
    elif name:
        fields["Sampler"] = name
    prompt = told.get("prompt")
    if isinstance(prompt, list):  # old versions store several prompts with weights
        prompt = ", ".join(_text(one.get("prompt")) for one in prompt if isinstance(one, dict))
    negative, positive = told.get("negative_prompt"), _text(told.get("positive_prompt")) or _text(prompt)
    if axes := "".join(axis for axis in "xy" if told.get(f"seamless_{axis}")):
        fields["Seamless"] = axes
    if isinstance(layers := told.get("clip_skip"), int) and layers > 0:
        fields["Clip skip"] = str(layers + 1)  # this key also counts the last layer
    rng = "torch" if told.get("rand_device", "cpu") == "cpu" else "cuda"
    base = GenerateRequest(rng=rng, prompt_syntax="compel", noise=Noise(posterior="mean"))
    negative = None if negative is None else _text(negative)
    return Told("InvokeAI", positive, negative, fields, base, tuple(notes), "share")


def dream(text: str) -> Told | None:
    """Read InvokeAI's oldest format: the prompt in quotes, followed by command-line options."""
    found = re.match(r'\s*"((?:\\.|[^"\\])*)"(.*)', text, re.DOTALL)
    if found is None:
        return None
    options = {one[1]: one[2] for one in re.finditer(r"-([a-zA-Z]) ?([\w.]{1,30})", found[2][:10_000])}
    names = {"s": "steps", "S": "seed", "C": "cfg_scale", "A": "sampler", "W": "width", "H": "height"}
    told = {name: options[key] for key, name in names.items() if key in options}
    return invoke({"prompt": found[1]} | told)


def fooocus(told: Mapping[str, Any]) -> Told:
    """Read Fooocus's own scheme. `full_prompt`, its expanded prompt, is the one that was used."""
    fields, notes = _fields(told)
    fields["Schedule type"] = _text(told.get("scheduler"))
    if size := re.fullmatch(r"\((\d{1,6}), (\d{1,6})\)", _text(told.get("resolution"))):
        fields["Size"] = f"{size[1]}x{size[2]}"
    full = {key: told.get(f"full_{key}") or told.get(key) for key in ("prompt", "negative_prompt")}
    prompts = ["\n".join(map(str, one)) if isinstance(one, list) else _text(one) for one in full.values()]
    if "clip_skip" in told:
        fields["Clip skip"] = _word(told["clip_skip"])
    base = COMFYUI_BASE.replace(prompt_syntax="a1111")
    return Told("Fooocus", prompts[0], prompts[1], fields, base, tuple(notes), "comfyui")


def swarm(told: Mapping[str, Any]) -> Told:
    """Read SwarmUI's `sui_image_params`. SwarmUI generates images with ComfyUI."""
    fields, notes = _fields(told)
    fields = {"Sampler": "euler"} | fields | {"Schedule type": _text(told.get("scheduler", "normal"))}
    prompts = _text(told.get("prompt")), _text(told.get("negativeprompt"))
    return Told("SwarmUI", *prompts, fields, COMFYUI_BASE, tuple(notes), "comfyui")


def novel(told: Mapping[str, Any], prompt: str) -> Told:
    """Read NovelAI's comment and description."""
    fields, notes = _fields(told)
    schedule = _text(told.get("noise_schedule"))
    fields["Schedule type"] = "normal" if schedule in ("", "native") else schedule
    said = prompt or _text(told.get("prompt"))
    if re.search(r"[{}]|\d::", said + _text(told.get("uc"))):
        notes.append("NovelAI's emphasis syntax, {…} and 1.2::…::, is treated as plain text")
    base = A1111_BASE.replace(prompt_syntax="plain", rng="torch")
    return Told("NovelAI", said, _text(told.get("uc")), fields, base, tuple(notes), "a1111")


def draw_things(told: Mapping[str, Any]) -> Told:
    """Read Draw Things' JSON, from EXIF's UserComment in XMP."""
    fields, notes = _fields(told)
    if told.get("strength") in (1, 1.0):
        fields.pop("Denoising strength", None)
    return Told("Draw Things", _text(told.get("c")), _text(told.get("uc")), fields, A1111_BASE, tuple(notes), "share")
