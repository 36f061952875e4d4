"""A1111's parameters: a prompt, a negative prompt and a `key: value` line; many other programs write them too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from sfumato.errors import UsageError
from sfumato.metadata.samplers import of_recipe
from sfumato.metadata.told import Told
from sfumato.metadata.words import written
from sfumato.request import AdapterFile, GenerateRequest

__all__ = ["parameters", "parse", "write"]

NEGATIVE = "Negative prompt:"
# A key, and a value: quoted with escapes, or up to the next comma.
PAIR = re.compile(r'(\w[\w \-/]{0,100}): *("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
MOST_LINE = 2**16
# The start of a prompt line that readers would mistake for a key. A leading space prevents this.
LOOKS = rf"(?= *(?:{NEGATIVE}|Steps: ))"
# Flat JSON that Civitai writes into the line without quoting it.
CIVITAI = re.compile(r", (Hashes|Civitai resources|Civitai metadata): (\{[^{}]{0,20000}\}|\[[^\[\]]{0,20000}\])")


def parse(text: str) -> Told | None:
    """Parse a text of parameters; None if it has no line of at least three `key: value` pairs."""
    lines = text.rstrip().split("\n")
    steps = [i for i, line in enumerate(lines) if line.startswith("Steps: ")][:1]
    # The last line, as in A1111, or the first that begins with "Steps: ", as on Civitai; never a line of a prompt.
    place = next((i for i in (len(lines) - 1, *steps) if i >= 0 and len(_pairs(lines[i])) > 2), None)
    if place is None:
        return None
    fields = _pairs(lines[place])
    ours = fields.get("Version", "").startswith("Sfumato")
    # Some extensions write a prompt's template after it.
    made = () if ours else ("Template:", "Negative Template:")
    said = "\n".join(line for line in lines[:place] if not line.startswith(made))
    texts = re.split(rf"(?:^|\n){NEGATIVE} ?", said, maxsplit=1)
    texts = [re.sub(f"^ {LOOKS}", "", one, flags=re.MULTILINE) if ours else one for one in texts]
    return Told(_program(fields), texts[0], texts[1] if len(texts) > 1 else None, fields)


def _pairs(line: str) -> dict[str, str]:
    if len(line) > MOST_LINE:
        return {}
    pairs = {found[1].strip(): _unquoted(found[2].strip()) for found in PAIR.finditer(CIVITAI.sub("", line))}
    return pairs | {found[1]: found[2] for found in CIVITAI.finditer(line)}


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value


def _program(fields: Mapping[str, str]) -> str:
    """Return the program by its version: Forge's begins with an f, and others contain their name."""
    version = fields.get("Version", "")
    found = re.match(r"(Sfumato|stable-diffusion\.cpp|ComfyUI|Fooocus|SD\.Next|Draw Things)", version, re.IGNORECASE)
    return "Forge" if version.startswith("f") else found[1] if found else "AUTOMATIC1111"


def parameters(recipe: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return A1111's text for a recipe and an image size (width, height); empty if the recipe has no request."""
    told = recipe.get("scheduler", {})
    try:
        request = GenerateRequest.from_dict(recipe["request"])
        sampler, schedule = of_recipe(told["class"], told["config"]) if told else ("", "")
        # Only the name of a path, for privacy.
        model = PurePath(recipe.get("model", {}).get("name", "")).name
        also = {"Sampler": sampler, "Schedule type": schedule, "Model": re.sub("[,:]", "", model)}
        also["Lora hashes"] = ", ".join(f"{_named(name)}: {one}" for name, one in recipe.get("adapters", {}).items())
        return write(request, size, also, recipe.get("versions", {}).get("sfumato", ""))
    except (UsageError, KeyError, TypeError, AttributeError):
        return ""


def write(request: GenerateRequest, size: tuple[int, int], also: Mapping[str, str], version: str = "") -> str:
    """Return the text for the first image of a request. size: (width, height) of the image.

    also: A1111's values for "Sampler", "Schedule type", "Model" and "Lora hashes", which `parse` does not need.
    Our own settings follow as further pairs, so `parse` and `request_of` restore the request, except for images, custom
    schedules and framing, which are only in our own recipe. Adapters are named in the prompt, as in A1111.
    """
    text = _marked((one := request.alone(0)).prompts[0]) + "".join(map(_tag, one.adapters))
    text += "" if one.negative_prompt is None else f"\n{NEGATIVE} {_marked(str(one.negative_prompt))}"
    pairs = written(one, size, also) | {"Version": f"Sfumato {version}".strip()}
    return f"{text}\n" + ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items())


def _tag(adapter: AdapterFile) -> str:
    weights = [adapter.weight] if adapter.text_weight is None else [adapter.text_weight, adapter.weight]
    return f" <lora:{_named(PurePath(adapter.file).stem)}:{':'.join(f'{weight:g}' for weight in weights)}>"


def _named(name: str) -> str:
    """Return a name without the characters that would end it."""
    return re.sub(r'[<>:,"\n]', "", name)


def _marked(text: str) -> str:
    return re.sub(f"^{LOOKS}", " ", text, flags=re.MULTILINE)


def _quoted(value: str) -> str:
    plain = value and value == value.strip() and not re.search(r'[,:\n"]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)
