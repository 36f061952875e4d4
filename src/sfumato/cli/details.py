"""Structured parts of a request, as they are written on the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.request import Fast, FreeU, GuidanceInterval, Hires

__all__ = ["fast", "freeu", "guidance_interval", "hires"]


def guidance_interval(steps: str | None, sigmas: str | None) -> GuidanceInterval | None:
    """Parse `--guidance-interval START,STOP` and `--guidance-sigmas MIN,MAX`."""
    from sfumato.request import GuidanceInterval

    if steps is None and sigmas is None:
        return None
    start, stop = _numbers("--guidance-interval", "0.2,0.8", steps, 2) or (0.0, 1.0)
    low, high = _numbers("--guidance-sigmas", "0.3,5.4", sigmas, 2) or (0.0, None)
    return GuidanceInterval(start=start, stop=stop, sigma_min=low, sigma_max=high)


def fast(text: str | None) -> Fast | None:
    """Parse `--fast 30dB`."""
    from sfumato.request import Fast

    numbers = _numbers("--fast", "30dB", None if text is None else re.sub(r"(?i)\s*dB\s*$", "", text), 1)
    if numbers is None:
        return None
    if not 1 <= numbers[0] <= 100:
        raise UsageError(f"--fast must be from 1dB to 100dB, not {text!r}")
    return Fast(promise=numbers[0])


def freeu(text: str | None) -> FreeU | None:
    """Parse `--freeu B1,B2,S1,S2`."""
    from sfumato.request import FreeU

    numbers = _numbers("--freeu", "1.5,1.6,0.9,0.2", text, 4)
    return None if numbers is None else FreeU(**dict(zip(("b1", "b2", "s1", "s2"), numbers, strict=True)))


def hires(size: str | None, **beside: Any) -> Hires | None:
    """Parse `--hires SCALE|WIDTHxHEIGHT` and its related options, given by field name.

    Raises `UsageError` for those without `--hires`.
    """
    from sfumato.request import Hires

    said = {name: value for name, value in beside.items() if value is not None}
    if size is None:
        if said:
            raise UsageError(f"--hires-{next(iter(said))} needs a second pass; give its size with --hires 2")
        return None
    if found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", size.strip()):
        return Hires(width=int(found[1]) or None, height=int(found[2]) or None, **said)
    (scale,) = _numbers("--hires", "2 or 1024x1536", size, 1) or (2.0,)
    return Hires(scale=scale, **said)


def _numbers(option: str, example: str, text: str | None, count: int) -> list[float] | None:
    """Parse an option's comma-separated numbers."""
    if text is None:
        return None
    try:
        numbers = [float(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise UsageError(f"{option} must be {wanted} such as {example}, not {text!r}")
    return numbers
