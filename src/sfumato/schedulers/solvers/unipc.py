"""UniPC: a multistep predictor whose next model output also corrects the point it was taken at (2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from sfumato.schedulers.rows import Row
from sfumato.schedulers.solvers.prediction import Grid, Level

__all__ = ["Step", "unipc"]


class Step(NamedTuple):
    """Weights of a step: predict x' = X x + sum_k predict_k d_k; once d' is known, x' again, with `correct`."""

    x: float
    predict: tuple[float, ...]
    correct: tuple[float, ...]


def unipc(
    grid: Grid, orders: Sequence[int], solver_type: str, predict_x0: bool, disable_corrector: Collection[int] = ()
) -> list[Row]:
    """Predict with the last p outputs; the next call corrects that with p + 1, then predicts again (algorithms 1-2).

    The corrector restarts from the x saved before the step, so a change to x in between affects the result only
    through the model, as in the ecosystem. Step i - 1 is not corrected if i - 1 is in `disable_corrector`. Where the
    ecosystem returns NaN (a final sigma of 0 reached in noise form or with an order above 1), the step goes exactly
    to x0.
    """
    rows, last = [], None
    for i, order in zip(grid.steps, orders, strict=True):
        step = _step(grid.levels[i - order + 1 : i + 2], predict_x0, solver_type == "bh2")
        correct = (last.x, *last.correct) if last is not None and i - 1 not in disable_corrector else ()
        model = grid.vp(i, noise=not predict_x0)
        if not predict_x0:
            model["clip"] = None
        rows.append(Row(**model, x=step.x, past=step.predict, save=True, keep=(0, max(orders)), correct=correct))
        last = step
    return rows


def _step(levels: Sequence[Level], predict_x0: bool, bh2: bool) -> Step:
    """Return the weights of a step of order p from the last p grid points and the next, oldest first (equations 5-9).

    With H = -h (x0) or h (noise): E = expm1(H), B = E (bh2) or H (bh1), r_k the past points' distances over h;
    b_k = k! g_k / B with g_1 = E/H - 1 and g_{k+1} = g_k/H - 1/(k+1)!. rho solves sum_j r_j^{k-1} rho_j = b_k.
    """
    *older, here, to = levels
    h = to.lam - here.lam
    if h == 0:
        return Step(1.0, (), ())
    if math.isinf(h):
        return Step(0.0, (to.alpha,), ()) if predict_x0 else Step(1 / here.alpha, (-here.sigma / here.alpha,), ())
    big_h = -h if predict_x0 else h
    a, k = (to.sigma / here.sigma, to.alpha) if predict_x0 else (to.alpha / here.alpha, to.sigma)
    e = math.expm1(big_h)
    b = e if bh2 else big_h
    r = np.array([(level.lam - here.lam) / h for level in reversed(older)] + [1.0])
    order = len(r)
    g, targets = e / big_h - 1, []
    for j in range(1, order + 1):
        targets.append(math.factorial(j) * g / b)
        g = g / big_h - 1 / math.factorial(j + 1)
    powers = np.vander(r, order, increasing=True).T
    # For the predictor of order 2 and the corrector of order 1, the paper uses the limit 1/2 instead of the solution.
    predictor = [0.5] if order == 2 else list(np.linalg.solve(powers[:-1, :-1], targets[:-1]))
    corrector = [0.5] if order == 1 else list(np.linalg.solve(powers, targets))
    past = tuple(float(-k * b * rho / r_k) for rho, r_k in zip(predictor, r, strict=False))
    fixed = tuple(float(-k * b * rho / r_k) for rho, r_k in zip(corrector[:-1], r, strict=False))
    new = float(-k * b * corrector[-1])
    return Step(a, (-k * e - sum(past), *past), (new, -k * e - sum(fixed) - new, *fixed))
