"""What an image's metadata says about how it was made, and the closest request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfumato.errors import UsageError
from sfumato.metadata.names import names
from sfumato.metadata.samplers import by_name
from sfumato.metadata.words import OURS, read_field
from sfumato.request import GenerateRequest, Hires, Noise, share_of
from sfumato.values import shown

__all__ = ["A1111_BASE", "Told", "request_of"]

# Defaults for images from A1111 and related programs.
A1111_BASE = GenerateRequest(rng="cuda", prompt_syntax="a1111", noise=Noise(posterior="mean"))
# Fields that only describe an image and are not needed to generate it.
INFORMS = frozenset(names()["informs"])


@dataclass(frozen=True)
class Told:
    """The settings in an image's metadata, with A1111's keys, whichever program wrote them.

    program: the one that wrote them; fields: all except the prompts, as texts; base: defaults for missing fields;
    notes: sentences about what the settings do not cover; strength: how "Denoising strength" reduces the steps: "share"
    (to int(steps · strength)), "a1111" (to one more than that) or "comfyui" (not at all, but on a longer schedule).
    """

    program: str
    prompt: str
    negative_prompt: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    base: GenerateRequest = A1111_BASE
    notes: tuple[str, ...] = ()
    strength: str = "a1111"

    def strengths(self, strength: float, steps: int) -> dict[str, Any]:
        """Return the strength, and if necessary the steps, that run the same number of steps as the program did."""
        if self.ours or self.strength == "share":
            return {"strength": strength}
        if self.strength == "comfyui":
            whole = steps if strength > 0.9999 else int(steps / max(strength, 1e-3))
            return {"steps": whole, "strength": share_of(steps, whole)}
        return {"strength": share_of(min(int(min(strength, 0.999) * steps) + 1, steps), steps)}

    @property
    def ours(self) -> bool:
        """Whether Sfumato wrote the settings, which are then exact."""
        return self.fields.get("Version", "").startswith("Sfumato")


def request_of(told: Told) -> tuple[GenerateRequest, list[str]]:
    """Return the request that generates the image again, and a note for each setting that it cannot reproduce."""
    base = OURS if told.ours else told.base
    # "Use same …" means that the second pass has the same setting as the first.
    told = replace(told, fields={key: value for key, value in told.fields.items() if not value.startswith("Use same")})
    request, notes = base.replace(prompt=told.prompt, negative_prompt=told.negative_prompt), list(told.notes)
    if any(key.startswith(("Hires ", "First pass size")) for key in told.fields):
        request = request.replace(hires=Hires(upscaler="lanczos"))  # for first versions and unknown upscalers
    elif "Denoising strength" in told.fields:
        notes.append("it was made from another image, which the file does not contain; give it with --image")
    for key in sorted(told.fields.keys() - INFORMS, key=lambda key: (key != "Steps", key)):  # other fields depend on it
        value = told.fields[key]
        try:
            request = read_field(key, value, request, told)
        except (UsageError, ValueError, KeyError, OverflowError):
            instead = "; Lanczos is used" if key == "Hires upscaler" else ""
            notes.append(f"{key} is ignored: {shown(value)}{instead}")
    if "Sampler" in told.fields and not told.ours:
        sampler, spacing = by_name(told.fields["Sampler"], told.fields.get("Schedule type"))
        named = " ".join(told.fields[key] for key in ("Sampler", "Schedule type") if key in told.fields)
        if sampler is None:
            notes.append(f"the sampler {shown(named)} is unknown; the checkpoint's own is used")
        else:
            request = request.replace(scheduler=sampler.name, spacing=spacing)
            notes += [f"{sampler.a1111}: {sampler.note}"] if sampler.note else []
            if spacing is None and sampler.spacing is not None:
                notes.append(f"the schedule of {shown(named)} is unknown; the sampler's own is used")
    return request, notes
