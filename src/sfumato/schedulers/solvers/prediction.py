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
    """One point of a variance-preserving grid: x = alpha x0 + sigma eps, lam = log(alpha / sigma)."""

    s: float
    alpha: float
    sigma: float
    lam: float

    @classmethod
    def of(cls, s: float, flow: bool = False) -> Level:
        """From the grid's s: the ratio sigma/alpha, or for rectified flow (2209.03003) the noise's share itself."""
        alpha = 1 - s if flow else 1 / math.sqrt(s * s + 1)
        return cls.at(s, alpha, s if flow else s * alpha)

    @classmethod
    def at(cls, s: float, alpha: float, sigma: float) -> Level:
        """From the shares of signal and noise."""
        return cls(s, alpha, sigma, math.log(alpha) - math.log(sigma) if sigma else math.inf)


@dataclass(frozen=True)
class Grid:
    """The input of every builder: timesteps and sigmas (one more, the final one), and the first step to take.

    data: the spread of the data, where the model is one of EDM's and x = x0 + s eps throughout.
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
        """The grid's points as signal and noise shares."""
        return [Level.of(s, self.flow) if self.data is None else Level.at(s, 1.0, s) for s in self.sigmas]

    def _scale(self, s: float) -> float:
        return 1 / math.sqrt(s * s + (self.data or 1.0) ** 2)

    def original(self, s: float) -> Pair:
        """Weights of x and of the output in x0, where x = x0 + s eps."""
        return ve_original(self.prediction, s, self.data)

    def ve(self, t: float, s: float) -> dict[str, Any]:
        """Fields of a row that calls the model at s and converts to dx/ds = (x - x0) / s (EDM, 2206.00364, eq. 3)."""
        a, b = original = self.original(s)
        clip = self.clip and replace(self.clip, weight=-1 / s)
        slope = ((1 - a) / s, -b / s)
        return {"t": t, "c_in": self._scale(s), "original": original, "convert": slope, "clip": clip}

    def ve_steps(self) -> Iterator[tuple[int, float, float, dict[str, Any]]]:
        """Of every step its index, the sigmas it leads from and to, and the fields of a row that calls the model."""
        for i in self.steps:
            yield i, self.sigmas[i], self.sigmas[i + 1], self.ve(self.timesteps[i], self.sigmas[i])

    def vp(self, i: int, *, noise: bool = False, through_x0: bool = False) -> dict[str, Any]:
        """Fields of a row that calls the model at point i and converts to x0, or to eps (perhaps by way of x0)."""
        s, alpha, sigma, _ = self.levels[i]
        edm = self.data is not None
        convert = original = self.original(s) if edm else vp_original(self.prediction, alpha, sigma, s)
        clip = self.clip
        if noise:
            # By way of x0 the ecosystem divides a flow's prediction by s; the two differ off a flow grid only.
            spread = s if through_x0 and self.prediction == "flow_prediction" else sigma
            known = "" if through_x0 and self.flow else self.prediction
            convert = noise_from(known, original, alpha, spread)
            clip = clip and replace(clip, weight=-alpha / spread)
        c_in = self._scale(s) if edm else 1.0
        return {"t": self.timesteps[i], "c_in": c_in, "original": original, "convert": convert, "clip": clip}


def vp_original(prediction: str, alpha: float, sigma: float, s: float = 0.0) -> Pair:
    """x0 = a x + b out where x = alpha x0 + sigma eps; v as in Progressive Distillation (2202.00512, appendix D).

    Raises `UsageError` for an eps-prediction of pure noise, which says nothing of x0.
    """
    match prediction:
        case "epsilon":
            if not alpha:
                raise UsageError(
                    "noise predicted from pure noise (rescale_betas_zero_snr) says nothing of the image; set "
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
    """Noise from x0, eps = (x - alpha x0) / sigma; for an eps-prediction exactly the output."""
    if prediction == "epsilon":
        return (0.0, 1.0)
    if prediction == "v_prediction":
        return (sigma, alpha)
    return ((1 - alpha * original[0]) / sigma, -alpha * original[1] / sigma)


def ve_original(prediction: str, s: float, data: float | None = None) -> Pair:
    """x0 = a x + b out where x = x0 + s eps and the model sees x / sqrt(s^2 + 1) (EDM, 2206.00364, table 1).

    With `data` the model is one of EDM's: it sees x / sqrt(s^2 + data^2), and "epsilon" is the network F itself.
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
