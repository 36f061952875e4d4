"""Samplers in sigma, x = x0 + s eps: Euler, Heun, DPM2, their ancestral forms, DPM++ SDE, and linear multistep.

All of them solve dx/ds = (x - x0(x, s)) / s (EDM, 2206.00364, equation 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sfumato.schedulers.rows import Row
from sfumato.schedulers.solvers.prediction import Grid

__all__ = ["Churn", "ancestral", "dpm2", "dpm_sde", "euler", "heun", "linear_multistep"]


class Churn(NamedTuple):
    """EDM's stochasticity, algorithm 2: noise added before a step if s lies between tmin and tmax."""

    churn: float = 0.0
    tmin: float = 0.0
    tmax: float = math.inf
    noise: float = 1.0


def euler(grid: Grid, churn: Churn) -> list[Row]:
    """Euler's method: x' = x + (s' - s) dx/ds (EDM, 2206.00364, algorithm 2 without the correction).

    With churn, s_hat = (1 + gamma) s and x_hat = x + sqrt(s_hat^2 - s^2) S_noise z replace s and x *after* the model
    call at s, as in the ecosystem, so that a row is still a single call.
    """
    rows = []
    for _, s, s_next, model in grid.ve_steps():
        gamma = min(churn.churn / (len(grid.sigmas) - 1), math.sqrt(2) - 1) if churn.tmin <= s <= churn.tmax else 0.0
        s_hat = s * (1 + gamma)
        # Outputs are converted at s_hat, but a v-prediction (except EDM's) at the s of the model call.
        a, b = grid.original(s if grid.prediction == "v_prediction" and grid.data is None else s_hat)
        model |= {"original": (a, b), "convert": ((1 - a) / s_hat, -b / s_hat)}
        h = s_next - s_hat
        sd = churn.noise * math.sqrt(s_hat * s_hat - s * s) * (1 + h * model["convert"][0])
        rows.append(Row(**model, past=(h,), noise=sd if gamma > 0 else None))
    return rows


def _split(s: float, s_next: float) -> tuple[float, float]:
    """Return down and up, s'^2 = down^2 + up^2: the target of an ancestral step, and the noise that leads up to s'."""
    return s_next * s_next / s, s_next * math.sqrt(1 - (s_next / s) ** 2)


def ancestral(grid: Grid) -> list[Row]:
    """Euler to s_down = s'^2 / s, then noise of s_up = s' sqrt(1 - (s'/s)^2): DDPM's step (2006.11239) in sigma.

    The last step generates noise of weight 0, as in the ecosystem.
    """
    rows = []
    for _, s, s_next, model in grid.ve_steps():
        down, up = _split(s, s_next)
        rows.append(Row(**model, past=(down - s,), noise=up))
    return rows


def heun(grid: Grid) -> list[Row]:
    """Euler to s', then the mean of both slopes from the saved x; the last step is Euler (EDM, algorithm 1)."""
    rows = []
    for i, s, s_next, model in grid.ve_steps():
        h = s_next - s
        rows.append(Row(**model, past=(h,), save=True, keep=(0, 1)))
        if i + 1 < len(grid.timesteps):
            again = grid.ve(grid.timesteps[i + 1], s_next)
            rows.append(Row(**again, x=0.0, saved=1.0, past=(h / 2, h / 2)))
    return rows


def dpm2(grid: Grid, mids: Sequence[float], ancestral: bool = False) -> list[Row]:
    """DPM-Solver-2: the slope at the midpoint in log sigma is used for the whole step (2206.00927, algorithm 1).

    m = sqrt(s u); x_m = x + (m - s) dx/ds(s); x' = x + (u - s) dx/ds(m) with u = s', or with u = s_down and noise
    s_up in the ancestral form. `mids[i]` is the timestep of step i's midpoint. The last step is Euler.
    """
    rows = []
    for i, s, s_next, model in grid.ve_steps():
        if i + 1 == len(grid.timesteps):
            rows.append(Row(**model, past=(s_next - s,)))
            break
        down, up = _split(s, s_next) if ancestral else (s_next, None)
        middle = math.sqrt(s * down)
        rows.append(Row(**model, past=(middle - s,), save=True))
        rows.append(Row(**grid.ve(mids[i], middle), x=0.0, saved=1.0, past=(down - s,), noise=up))
    return rows


def dpm_sde(
    grid: Grid, mids: Sequence[float], spans: Sequence[tuple[float, float, float]], noise_scale: float
) -> list[Row]:
    """DPM-Solver++ as an SDE, two calls per step (2211.01095, section 5, with the ancestral noise of k-diffusion).

    Both calls start from the same x: the first goes to u = m, the midpoint in log sigma, the second to u = s'. With
    r = (u/s)^2: x' = r x + (1 - r) x0 + u sqrt(1 - r) z(s, u). `spans[i]` are (s, m, s') on the Brownian path.
    """
    rows = []
    for i, s, s_next, model in grid.ve_steps():
        if i + 1 == len(grid.timesteps):
            rows.append(Row(**model, past=(s_next - s,)))
            break
        middle = math.sqrt(s * s_next)
        half = grid.ve(mids[i], middle)
        for first, call, to in ((True, model, middle), (False, half, s_next)):
            r = (to / s) ** 2
            call["convert"] = call["original"]
            weights: dict[str, Any] = {"x": r, "save": True} if first else {"x": 0.0, "saved": r}
            span = (spans[i][0], spans[i][1 if first else 2])
            rows.append(Row(**call, **weights, past=(1 - r,), span=span, noise=noise_scale * to * math.sqrt(1 - r)))
    return rows


def linear_multistep(grid: Grid, order: int) -> list[Row]:
    """Adams-Bashforth: x' = x + sum_k d_k times the integral over s..s' of the Lagrange basis on s_i, s_{i-1}, …

    Parity note: as in the ecosystem, the order counts from the start of the *grid*. After a late start
    (image-to-image), only the newest weights of a high-order rule are used, whose sum is not s' - s, until the history
    is full.
    """
    nodes, weights = np.polynomial.legendre.leggauss((order + 1) // 2)
    rows = []
    for i, s, s_next, model in grid.ve_steps():
        h = s_next - s
        points = [grid.sigmas[i - k] for k in range(min(order, i + 1))]
        at = s + h * (nodes + 1) / 2
        past = []
        for k in range(min(len(points), i - grid.start + 1)):
            basis = math.prod((at - p) / (points[k] - p) for j, p in enumerate(points) if j != k)
            past.append(float(np.sum(weights * basis) * h / 2))
        rows.append(Row(**model, past=tuple(past), keep=(0, order - 1)))
    return rows
