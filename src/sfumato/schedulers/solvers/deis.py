"""DEIS: exponential integrator with a polynomial through past noise predictions (2204.13902)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfumato.schedulers.rows import Row
from sfumato.schedulers.solvers.prediction import Grid

__all__ = ["deis"]


def deis(grid: Grid, orders: Sequence[int]) -> list[Row]:
    """Build steps x' = alpha' (x / alpha + sum_k c_k d_k), c_k integrals over u = s..s' of the Lagrange basis in log u.

    The nodes are the last `order` grid points, u = sigma/alpha, and d the noise predictions (equations 14-15 in the
    "log rho" variable). `orders` has one entry per step.
    """
    ratios = [level.sigma / level.alpha for level in grid.levels]
    rows = []
    for i, order in zip(grid.steps, orders, strict=True):
        alpha = grid.levels[i + 1].alpha
        past = tuple(alpha * c for c in _integrals([ratios[i - k] for k in range(order)], ratios[i + 1]))
        x = alpha / grid.levels[i].alpha
        rows.append(Row(**grid.vp(i, noise=True, through_x0=True), x=x, past=past, keep=(0, max(orders) - 1)))
    return rows


def _integrals(nodes: list[float], end: float) -> list[float]:
    """Integrate the Lagrange basis in log u from nodes[0] to `end`, in closed form, for one to three nodes.

    The antiderivatives of L = ln u - p and of L M, M = ln u - q, are u (L - 1) and u (L M - L - M + 2).
    """
    if len(nodes) == 1:
        return [end - nodes[0]]

    def antiderivative(u: float, roots: list[float]) -> float:
        logs = [math.log(u) - root for root in roots]
        return u * (math.prod(logs) - sum(logs) + 2) if len(logs) == 2 else u * (logs[0] - 1)

    logs = [math.log(node) for node in nodes]
    weights = []
    for k, log in enumerate(logs):
        others = logs[:k] + logs[k + 1 :]
        area = antiderivative(end, others) - antiderivative(nodes[0], others)
        weights.append(area / math.prod(log - other for other in others))
    return weights
