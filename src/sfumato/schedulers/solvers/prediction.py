"""An interval of the noise grid, and how to interpret the model's output at each of its points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from sfumato.errors import UsageError
from sfumato.schedulers.rows import Clip

__all__ = ["Grid", "Level", "noise_from", "ve_original", "vp_original"]

Pair = tuple[float, float]


class Level(NamedTuple):
    """A point of a variance-preserving grid: x = alpha x0 + sigma eps, lam = log(alpha / sigma)."""

    s: float
    alpha: float
    sigma: float
    lam: float

    @classmethod
    def of(cls, s: float, flow: bool = False) -> Level:
        """Create a level from the grid's s: sigma/alpha, or the noise weight for rectified flow (2209.03003)."""
        alpha = 1 - s if flow else 1 / math.sqrt(s * s + 1)
        return cls.at(s, alpha, s if flow else s * alpha)

    @classmethod
    def at(cls, s: float, alpha: float, sigma: float) -> Level:
        """Create a level from the weights of signal and noise."""
        return cls(s, alpha, sigma, math.log(alpha) - math.log(sigma) if sigma else math.inf)


@dataclass(frozen=True)
class Grid:
    """The input of every builder: timesteps, sigmas (with the final one, so one more), and the first step to build.

    data: standard deviation of the data for EDM models, which use x = x0 + s eps throughout; None for others.
    """

    timesteps: Sequence[float]
    sigmas: Sequence[float]
    prediction: str
    start: int = 0
    flow: bool = False
    clip: Clip | None = None
    data: float | None = None

    @property
    def steps(self) -> range:
        """Indices of the steps to build."""
        return range(self.start, len(self.timesteps))

    @cached_property
    def levels(self) -> list[Level]:
        """The points of the grid with their signal and noise weights."""
        return [Level.of(s, self.flow) if self.data is None else Level.at(s, 1.0, s) for s in self.sigmas]

    def _scale(self, s: float) -> float:
        return 1 / math.sqrt(s * s + (self.data or 1.0) ** 2)

    def original(self, s: float) -> Pair:
        """Return the weights of x and of the output in x0, for x = x0 + s eps."""
        return ve_original(self.prediction, s, self.data)

    def ve(self, t: float, s: float) -> dict[str, Any]:
        """Return row fields that call the model at s and convert to dx/ds = (x - x0) / s (EDM, 2206.00364, eq. 3)."""
        a, b = original = self.original(s)
        clip = self.clip and replace(self.clip, weight=-1 / s)
        slope = ((1 - a) / s, -b / s)
        return {"t": t, "c_in": self._scale(s), "original": original, "convert": slope, "clip": clip}

    def ve_steps(self) -> Iterator[tuple[int, float, float, dict[str, Any]]]:
        """Yield, for every step, its index, the sigmas it goes from and to, and row fields that call the model."""
        for i in self.steps:
            yield i, self.sigmas[i], self.sigmas[i + 1], self.ve(self.timesteps[i], self.sigmas[i])

    def vp(self, i: int, *, noise: bool = False, through_x0: bool = False) -> dict[str, Any]:
        """Return row fields that call the model at point i and convert to x0, or to eps (optionally through x0)."""
        s, alpha, sigma, _ = self.levels[i]
        edm = self.data is not None
        convert = original = self.original(s) if edm else vp_original(self.prediction, alpha, sigma, s)
        clip = self.clip
        if noise:
            # Through x0, the ecosystem divides a flow prediction by s, which differs from sigma off a flow grid.
            spread = s if through_x0 and self.prediction == "flow_prediction" else sigma
            known = "" if through_x0 and self.flow else self.prediction
            convert = noise_from(known, original, alpha, spread)
            clip = clip and replace(clip, weight=-alpha / spread)
        c_in = self._scale(s) if edm else 1.0
        return {"t": self.timesteps[i], "c_in": c_in, "original": original, "convert": convert, "clip": clip}


def vp_original(prediction: str, alpha: float, sigma: float, s: float = 0.0) -> Pair:
    """Return a and b of x0 = a x + b out, for x = alpha x0 + sigma eps; v as in 2202.00512, appendix D.

    Raises `UsageError` for an eps-prediction at pure noise, which does not determine x0.
    """
    match prediction:
        case "epsilon":
            if not alpha:
                raise UsageError(
                    "noise predicted from pure noise (rescale_betas_zero_snr) says nothing about the image; set "
                    "prediction_type to 'v_prediction', or rescale_betas_zero_snr to false"
                )
            return (1 / alpha, -sigma / alpha)
        case "v_prediction":
            return (alpha, -sigma)
        case "flow_prediction":
            return (1.0, -s)
        case _:
            return (0.0, 1.0)


def noise_from(prediction: str, original: Pair, alpha: float, sigma: float) -> Pair:
    """Return the weights of x and out in eps = (x - alpha x0) / sigma; an eps-prediction is exactly the output."""
    if prediction == "epsilon":
        return (0.0, 1.0)
    if prediction == "v_prediction":
        return (sigma, alpha)
    return ((1 - alpha * original[0]) / sigma, -alpha * original[1] / sigma)


def ve_original(prediction: str, s: float, data: float | None = None) -> Pair:
    """Return a and b of x0 = a x + b out, for x = x0 + s eps and input x / sqrt(s^2 + 1) (EDM, 2206.00364, table 1).

    With `data`, the model is an EDM model: its input is x / sqrt(s^2 + data^2), and "epsilon" is the raw output F.
    """
    d = data or 1.0
    skip, out = d * d / (s * s + d * d), s * d / math.sqrt(s * s + d * d)
    match prediction:
        case "epsilon":
            return (1.0, -s) if data is None else (skip, out)
        case "v_prediction":
            return (skip, -out)
        case _:
            return (0.0, 1.0)
