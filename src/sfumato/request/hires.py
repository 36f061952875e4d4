"""The second pass of a request, over its enlarged image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from sfumato.request.records import Pixels, Record, check_word
from sfumato.values import Within

__all__ = ["UPSCALERS", "Hires", "SecondPass", "share_of"]

# Upscalers for latents, and "lanczos", which enlarges pixels.
UPSCALERS = (
    "latent", "latent-antialiased", "latent-bicubic", "latent-bicubic-antialiased", "latent-nearest",
    "latent-nearest-exact", "lanczos",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hires(Record):
    """A second pass over an enlarged image (A1111's "Hires. fix"): image-to-image with fresh noise of the same seed.

    A custom schedule applies only to the first pass; a refiner takes over in the second one.

    scale            the factor for both sides, if neither width nor height is given
    width, height    of the result; one of them keeps the aspect ratio, both crop the image evenly
    upscaler         "latent" (bilinear) or another upscaler for latents, or "lanczos" for pixels
    strength         how much the second pass changes, 0 to 1
    steps            of the second pass, all of which are run; the request's if None
    prompt, negative_prompt  for the second pass; the request's if None
    guidance_scale, scheduler, spacing  the same
    """

    scale: Annotated[float, Within(1, 16)] = 2.0
    width: Pixels | None = None
    height: Pixels | None = None
    upscaler: str = "latent"
    strength: Annotated[float, Within(0.01, 1)] = 0.7
    steps: Annotated[int, Within(1, 10_000)] | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    spacing: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("upscaler", self.upscaler, UPSCALERS)

    def sizes(self, width: int, height: int, unit: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the enlarged size for (width, height), and the size after cropping; both are multiples of `unit`."""
        if self.width is None and self.height is None:
            enlarged = int(width * self.scale), int(height * self.scale)
        elif self.height is None or (self.width is not None and width * self.height <= height * self.width):
            enlarged = self.width or 0, (self.width or 0) * height // width
        else:
            enlarged = self.height * width // height, self.height
        whole = max(unit, enlarged[0] // unit * unit), max(unit, enlarged[1] // unit * unit)
        both = self.width is not None and self.height is not None
        kept = (min(whole[0], self.width // unit * unit), min(whole[1], self.height // unit * unit)) if both else whole  # pyright: ignore[reportOptionalOperand]
        return whole, kept


SecondPass = Annotated[Hires, "the fields of a Hires"]


def share_of(calls: int, steps: int) -> float:
    """Return the strength for which int(steps * strength) is `calls`."""
    share = calls / steps
    while int(steps * share) < calls:
        share = math.nextafter(share, 2)
    return min(share, 1.0)
