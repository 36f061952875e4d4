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

# What holds of A1111's pictures and its relatives' where they do not say otherwise.
A1111_BASE = GenerateRequest(rng="cuda", prompt_syntax="a1111", noise=Noise(posterior="mean"))
# What says something of a picture, and nothing of how to draw it from the checkpoint that is named for it.
INFORMS = frozenset(names()["informs"])


@dataclass(frozen=True)
class Told:
    """What a picture says, in the words of A1111's parameters whoever wrote it.

    program: who did; fields: all but the prompts, as texts by A1111's keys; base: what holds where they are silent;
    notes: what the picture needs beside, in sentences; strength: how "Denoising strength" shortens the steps, "share"
    (int(steps · strength) of them are taken), "a1111" (one more) or "comfyui" (all of them, of a longer schedule).
    """

    program: str
    prompt: str
    negative_prompt: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    base: GenerateRequest = A1111_BASE
    notes: tuple[str, ...] = ()
    strength: str = "a1111"

    def strengths(self, strength: float, steps: int) -> dict[str, Any]:
        """The strength at which as many of the steps are taken as were there, and where need be other steps."""
        if self.ours or self.strength == "share":
            return {"strength": strength}
        if self.strength == "comfyui":
            whole = steps if strength > 0.9999 else int(steps / max(strength, 1e-3))
            return {"steps": whole, "strength": share_of(steps, whole)}
        return {"strength": share_of(min(int(min(strength, 0.999) * steps) + 1, steps), steps)}

    @property
    def ours(self) -> bool:
        """Whether Sfumato wrote it, whose words are exact."""
        return self.fields.get("Version", "").startswith("Sfumato")


def request_of(told: Told) -> tuple[GenerateRequest, list[str]]:
    """The request that draws it again, and a sentence for each thing in which that cannot be the same."""
    base = OURS if told.ours else told.base
    # What a second pass has in common with the first.
    told = replace(told, fields={key: value for key, value in told.fields.items() if not value.startswith("Use same")})
    request, notes = base.replace(prompt=told.prompt, negative_prompt=told.negative_prompt), list(told.notes)
    if any(key.startswith(("Hires ", "First pass size")) for key in told.fields):
        request = request.replace(hires=Hires(upscaler="lanczos"))  # as the first versions did; or one is not known
    elif "Denoising strength" in told.fields:
        notes.append("it was made from another image, which the file does not contain; give it with --image")
    for key in sorted(told.fields.keys() - INFORMS, key=lambda key: (key != "Steps", key)):  # which others reckon with
        value = told.fields[key]
        try:
            request = read_field(key, value, request, told)
        except (UsageError, ValueError, KeyError, OverflowError):
            instead = "; Lanczos is used" if key == "Hires upscaler" else ""
            notes.append(f"{key} is not honoured: {shown(value)}{instead}")
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
