"""DPM-Solver and DPM-Solver++ (2206.00927, 2211.01095), multistep and singlestep, as ODE and as SDE.

A step of order p runs from its *base*, h long in lambda, by the last p model outputs d_0 (newest), d_1, d_2. The
`points` are where these were taken, as shares of h from the base, oldest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sfumato.schedulers.rows import Row
from sfumato.schedulers.solvers.prediction import Grid, Level

__all__ = ["Terms", "dpm_solver"]


class Terms(NamedTuple):
    """x' = x_weight x + k1 D0 + (k2 or f1) D1 + f2 D2 + noise z for a step h in lambda, D_j the j-th differences."""

    x_weight: float
    k1: float
    f1: float
    f2: float
    noise: float | None


def _terms(algorithm: str, base: Level, to: Level) -> Terms:
    """Integrate the linear part exactly over the step, for each of the four formulations.

    DPM-Solver: 2206.00927, equation 3.4; DPM-Solver++: 2211.01095, equation 10 (appendix B for order 3), its SDE form
    equation 18. A final sigma of 0 (h infinite) gives x' = x0.
    """
    h = to.lam - base.lam
    if math.isinf(h):
        return Terms(0.0, to.alpha, to.alpha, -0.0, 0.0 if algorithm.startswith("sde") else None)
    match algorithm:
        case "dpmsolver++":
            e, scale, x = math.expm1(-h), to.alpha, to.sigma / base.sigma
            return Terms(x, -scale * e, scale * (e / h + 1), -scale * ((e + h) / h**2 - 0.5), None)
        case "sde-dpmsolver++":
            e, scale, x = -math.expm1(-2 * h), to.alpha, to.sigma / base.sigma * math.exp(-h)
            f2 = scale * ((e - 2 * h) / (2 * h) ** 2 - 0.5)
            return Terms(x, scale * e, scale * (1 - e / (2 * h)), f2, to.sigma * math.sqrt(max(e, 0.0)))
        case _:
            e, scale, x = math.expm1(h), to.sigma, to.alpha / base.alpha
            factor = 2.0 if algorithm.startswith("sde") else 1.0
            noise = scale * math.sqrt(math.expm1(2 * h)) if algorithm.startswith("sde") else None
            f1, f2 = -factor * scale * (e / h - 1), -scale * ((e - h) / h**2 - 0.5)
            return Terms(x, -factor * scale * e, f1, f2, noise)


def dpm_solver(grid: Grid, algorithm: str, heun: bool, orders: Sequence[int], *, single: bool) -> list[Row]:
    """Build steps x' = X x + sum_k w_k d_k + noise z; `orders` has one entry per step.

    A multistep method takes every step from the current point (2211.01095, algorithm 2). A singlestep method
    (`single`) runs through orders 1, 2, 3, each from the x saved at the last order 1 (2206.00927, algorithms 1-2).
    """
    levels, rows = grid.levels, []
    for i, order in zip(grid.steps, orders, strict=True):
        base, to = levels[i - order + 1 if single else i], levels[i + 1]
        model = grid.vp(i, noise=not algorithm.endswith("++"))
        model |= {"keep": (0, max(orders) - 1), "save": single and order == 1}
        if to.lam == base.lam:  # repeated sigma: nothing to do, and the ratios below would be 0/0
            rows.append(Row(**model, noise=0.0 if algorithm.startswith("sde") else None))
            continue
        step = _terms(algorithm, base, to)
        points = [(level.lam - base.lam) / (to.lam - base.lam) for level in levels[i - order + 1 : i + 1]]
        weights = _singlestep_weights if single else _multistep_weights
        past = (step.k1,) if order == 1 else weights(step, points, heun)
        start: dict[str, Any] = {"x": 0.0, "saved": step.x_weight} if single and order > 1 else {"x": step.x_weight}
        rows.append(Row(**model, **start, past=past, noise=step.noise))
    return rows


def _multistep_weights(step: Terms, points: Sequence[float], heun: bool) -> tuple[float, ...]:
    """Return the weights of k1 D0 + f D1 + f2 D2, divided differences of outputs r0 and r1 apart, with D0 = d0.

    Order 2: D1 = (d0 - d1)/r0 with f = k1/2 (midpoint) or f1 (heun). Order 3: always f1 and f2, with
    D1 = D10 + q (D10 - D11), D2 = (D10 - D11)/(r0 + r1), q = r0/(r0 + r1).
    """
    _, k1, f1, f2, _ = step
    r0 = -points[-2]
    if len(points) == 2:
        c = (f1 if heun else k1 / 2) / r0
        return (k1 + c, -c)
    r1 = points[1] - points[0]
    q = r0 / (r0 + r1)
    c0, c1 = f1 * (1 + q) + f2 / (r0 + r1), -f1 * q - f2 / (r0 + r1)
    return (k1 + c0 / r0, -c0 / r0 + c1 / r1, -c1 / r1)


def _singlestep_weights(step: Terms, points: Sequence[float], heun: bool) -> tuple[float, ...]:
    """Return the weights of k1 D0 + f D1 + f2 D2, with D0 the output at the base and r1, r0 the points after it.

    Order 2: D1 = (d0 - d1)/r0, f as in multistep. Order 3: D10 = (d1 - d2)/r1, D11 = (d0 - d2)/r0; midpoint uses
    f1 D11, heun f1 (r0 D10 - r1 D11)/(r0 - r1) + f2 2 (D11 - D10)/(r0 - r1).
    """
    _, k1, f1, f2, _ = step
    r0 = points[-1]
    if len(points) == 2:
        c = (f1 if heun else k1 / 2) / r0
        return (c, k1 - c)
    r1 = points[1]
    c0 = (f1 * r0 - 2 * f2) / (r0 - r1) if heun else 0.0
    c1 = (2 * f2 - f1 * r1) / (r0 - r1) if heun else f1
    return (c1 / r0, c0 / r1, k1 - c1 / r0 - c0 / r1)
