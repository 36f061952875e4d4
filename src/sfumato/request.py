"""The one description of what to draw: the command line, a Python call and a replayed picture all become one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import isfinite
from typing import Any, Self

from sfumato.errors import UnknownArgument, UsageError, suggest

__all__ = ["LARGEST_SEEDS", "GenerateRequest"]

# The sources of random numbers that `rng` names, and the largest seed of each.
LARGEST_SEEDS = {"torch": 2**63 - 1, "numpy": 2**32 - 1}


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to draw; a picture is a function of (checkpoint, request, seed, index).

    prompt            what to draw: one text, or several for several pictures
    negative_prompt   what to keep away from: one text for all, or one per prompt
    steps             denoising steps
    guidance_scale    how strongly to follow the prompt (1 or less: no guidance, half the work)
    guidance_rescale  0 to 1; tames over-exposure (arXiv 2305.08891, section 3.4)
    seed              image i is drawn with seed + i; None picks one, and the result says which
    rng               where noise comes from: "torch", or "numpy" as in Apple's Core ML runners
    count             pictures per prompt
    width, height     pixels; the checkpoint's own size if None
    scheduler         a short name ("dpmpp_2m_karras"); the checkpoint's own if None
    eta               DDIM's noise, 0 (none) to 1
    clip_skip         how many of the text encoder's last layers to leave out
    timesteps, sigmas a custom schedule in place of `steps`, for schedulers that take one
    image, strength   the picture file to start from, and how far to leave it: 0 (not at all) to 1 (wholly)
    """

    prompt: str | tuple[str, ...] = ""
    negative_prompt: str | tuple[str, ...] | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    seed: int | None = None
    rng: str = "torch"
    count: int = 1
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    eta: float = 0.0
    clip_skip: int | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    image: str | None = None
    strength: float = 0.8

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "timesteps", "sigmas"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_texts()
        for name in ("steps", "count"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise UsageError(f"{name} must be a positive number of pixels, not {value!r}")
        for name, low, high in (
            ("guidance_scale", None, None),
            ("guidance_rescale", 0, 1),
            ("eta", 0, 1),
            ("strength", 0, 1),
        ):
            _check_number(name, getattr(self, name), low, high)
        self._check_seed()
        if self.clip_skip is not None and (not _is_int(self.clip_skip) or self.clip_skip < 0):
            raise UsageError(f"clip_skip must be a whole number of at least 0, not {self.clip_skip!r}")
        if self.timesteps is not None and self.sigmas is not None:
            raise UsageError("timesteps and sigmas both describe the schedule; give one of them")

    def _check_texts(self) -> None:
        if not isinstance(self.prompt, str) and not (_are_texts(self.prompt) and self.prompt):
            raise UsageError("prompt must be a text or a list of at least one text")
        negative = self.negative_prompt
        if negative is None or isinstance(negative, str):
            return
        if not _are_texts(negative):
            raise UsageError("negative_prompt must be a text or a list of one text per prompt")
        if len(negative) != len(self.prompts):
            raise UsageError(
                f"negative_prompt must be one text, or one per prompt: there are {len(self.prompts)} prompts and "
                f"{len(negative)} negative prompts"
            )

    def _check_seed(self) -> None:
        if not isinstance(self.rng, str) or self.rng not in LARGEST_SEEDS:
            raise UsageError(f"rng must be {' or '.join(LARGEST_SEEDS)}, not {self.rng!r}")
        largest = LARGEST_SEEDS[self.rng]
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed <= largest):
            limits = f"0 to 2**{largest.bit_length()} - 1" + ("" if self.rng == "torch" else f" with rng {self.rng}")
            raise UsageError(f"seed must be a whole number from {limits}, not {self.seed!r}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture, which begins again at 0 after the largest; empty where none was given."""
        if self.seed is None:
            return ()
        return tuple((self.seed + index) % (LARGEST_SEEDS[self.rng] + 1) for index in range(self.batch_size))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, also where there is only one."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """One negative prompt for each prompt; empty texts where none was given."""
        negative = self.negative_prompt or ""
        return (negative,) * len(self.prompts) if isinstance(negative, str) else negative

    @property
    def batch_size(self) -> int:
        """Pictures in all."""
        return len(self.prompts) * self.count

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The way back from `to_dict`. Raises `UnknownArgument` for a field that does not exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownArgument(f"a request has no field {name!r}{suggest(name, known)}")
        return cls(**values)


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: Any, low: float | None, high: float | None) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not ok or (low is not None and value < low) or (high is not None and value > high):
        limits = "" if low is None else f" from {low:g} to {high:g}"
        raise UsageError(f"{name} must be a number{limits}, not {value!r}")
