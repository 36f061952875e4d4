"""DPM-Solver and DPM-Solver++ (2206.00927, 2211.01095), multistep and singlestep, as ODE and as SDE, and their terms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from sfumato.schedulers.rows import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.schedulers.solvers.prediction import Grid, Level

__all__ = ["multistep", "singlestep"]


class Terms(NamedTuple):
    """x' = x_weight x + k1 D0 + (k2 or f1) D1 + f2 D2 + noise z over a step h in lambda, D_j the j-th differences."""

    x_weight: float
    k1: float
    f1: float
    f2: float
    noise: float | None


def terms(algorithm: str, base: Level, to: Level) -> Terms:
    """Exact integrals of the linear part over the step, for each of the four formulations.

    DPM-Solver: 2206.00927 equation 3.4; DPM-Solver++: 2211.01095 equation 10 (appendix B for order 3), its SDE form
    equation 18. A final sigma of 0 (h infinite) leaves x' = x0.
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
            return Terms(x, scale * e, scale * (1 - e / (2 * h)), f2, to.sigma * math.sqrt(e))
        case _:
            e, scale, x = math.expm1(h), to.sigma, to.alpha / base.alpha
            factor = 2.0 if algorithm.startswith("sde") else 1.0
            noise = scale * math.sqrt(math.expm1(2 * h)) if algorithm.startswith("sde") else None
            f1, f2 = -factor * scale * (e / h - 1), -scale * ((e - h) / h**2 - 0.5)
            return Terms(x, -factor * scale * e, f1, f2, noise)


def _model(grid: Grid, i: int, algorithm: str, orders: Sequence[int]) -> dict[str, Any]:
    return grid.vp(i, noise=not algorithm.endswith("++")) | {"keep": (0, max(orders) - 1)}


def multistep(grid: Grid, algorithm: str, heun: bool, orders: Sequence[int]) -> list[Row]:
    """One step is x' = X x + k1 D0 + f D1 + f2 D2 with divided differences of past outputs (2211.01095, algorithm 2).

    D0 = d0; order 2: D1 = (d0 - d1)/r0 with f = k1/2 (midpoint) or f1 (heun); order 3 always f1 and f2, with
    D1 = D10 + q (D10 - D11), D2 = (D10 - D11)/(r0 + r1), q = r0/(r0 + r1). `orders` has one entry per step built.
    """
    levels, rows = grid.levels, []
    for i, order in zip(grid.steps, orders, strict=True):
        here, to = levels[i], levels[i + 1]
        model = _model(grid, i, algorithm, orders)
        if to.lam == here.lam:  # a repeated sigma: nothing to do, and every ratio below would be 0/0
            rows.append(Row(**model, noise=0.0 if algorithm.startswith("sde") else None))
            continue
        x, k1, f1, f2, noise = terms(algorithm, here, to)
        h = to.lam - here.lam
        if order == 1:
            past = (k1,)
        elif order == 2:
            c = (f1 if heun else k1 / 2) * h / (here.lam - levels[i - 1].lam)
            past = (k1 + c, -c)
        else:
            r0 = (here.lam - levels[i - 1].lam) / h
            r1 = (levels[i - 1].lam - levels[i - 2].lam) / h
            q = r0 / (r0 + r1)
            c0, c1 = f1 * (1 + q) + f2 / (r0 + r1), -f1 * q - f2 / (r0 + r1)
            past = (k1 + c0 / r0, -c0 / r0 + c1 / r1, -c1 / r1)
        rows.append(Row(**model, x=x, past=past, noise=noise))
    return rows


def singlestep(grid: Grid, algorithm: str, heun: bool, orders: Sequence[int]) -> list[Row]:
    """Orders 1, 2, 3 in turn, each from the x saved at the last order 1 (2206.00927, algorithms 1-2; 2211.01095).

    The base b is the grid point of that x, r0 and r1 the later points' shares of the step from it. Order 2:
    D1 = (d0 - d1)/r0. Order 3: D10 = (d1 - d2)/r1, D11 = (d0 - d2)/r0; midpoint takes f1 D11, heun
    f1 (r0 D10 - r1 D11)/(r0 - r1) + f2 2 (D11 - D10)/(r0 - r1).
    """
    levels, rows = grid.levels, []
    for i, order in zip(grid.steps, orders, strict=True):
        base, here, to = levels[i - order + 1], levels[i], levels[i + 1]
        model = _model(grid, i, algorithm, orders)
        if to.lam == base.lam:
            rows.append(Row(**model, save=order == 1, noise=0.0 if algorithm.startswith("sde") else None))
            continue
        x, k1, f1, f2, noise = terms(algorithm, base, to)
        if order == 1:
            rows.append(Row(**model, x=x, past=(k1,), save=True, noise=noise))
            continue
        r0 = (here.lam - base.lam) / (to.lam - base.lam)
        if order == 2:
            c = (f1 if heun else k1 / 2) / r0
            past = (c, k1 - c)
        else:
            r1 = (levels[i - 1].lam - base.lam) / (to.lam - base.lam)
            c0 = (f1 * r0 - 2 * f2) / (r0 - r1) if heun else 0.0
            c1 = (2 * f2 - f1 * r1) / (r0 - r1) if heun else f1
            past = (c1 / r0, c0 / r1, k1 - c1 / r0 - c0 / r1)
        rows.append(Row(**model, x=0.0, saved=x, past=past, noise=noise))
    return rows
