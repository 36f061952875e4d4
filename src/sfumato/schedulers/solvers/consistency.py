"""Consistency samplers: LCM, which jumps to the end of the trajectory, and TCD, which jumps to any point on it.

x = sqrt(a) x0 + sqrt(1 - a) eps as in `discrete`; a' (`a_next`) is the cumulative product where the step leads.
"""

from __future__ import annotations

import math

from sfumato.schedulers.rows import Clip, Row
from sfumato.schedulers.solvers.prediction import noise_from, vp_original

__all__ = ["boundary", "lcm_row", "tcd_row"]

SIGMA_DATA = 0.5  # standard deviation of the data in the boundary condition


def boundary(t: float, scaling: float) -> tuple[float, float]:
    """Return c_skip and c_out of f = c_skip x + c_out x0, for which f(x, 0) = x (2310.04378, section 4.1)."""
    s = t * scaling
    return SIGMA_DATA**2 / (s * s + SIGMA_DATA**2), s / math.sqrt(s * s + SIGMA_DATA**2)


def lcm_row(t: float, a: float, a_next: float | None, prediction: str, scaling: float, clip: Clip | None) -> Row:
    """Jump to the consistency function f and add noise: x' = sqrt(a') f + sqrt(1 - a') z (2310.04378, algorithm 3).

    `a_next` is None for the last step, which ends at f without noise.
    """
    c_skip, c_out = boundary(t, scaling)
    original = vp_original(prediction, math.sqrt(a), math.sqrt(1 - a))
    signal, noise = (1.0, None) if a_next is None else (math.sqrt(a_next), math.sqrt(1 - a_next))
    return Row(
        t=t, original=original, convert=original, clip=clip, x=signal * c_skip, past=(signal * c_out,), noise=noise
    )


def tcd_row(t: float, a: float, a_s: float, a_next: float | None, prediction: str) -> Row:
    """Go to x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps, then back up to a' by adding noise (2402.19159, equation 10).

    x' = sqrt(a'/a_s) x_s + sqrt(1 - a'/a_s) z. `a_next` is None if the step ends at x_s without noise.
    """
    alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
    original = vp_original(prediction, alpha, sigma)
    x, out = noise_from(prediction, original, alpha, sigma)
    kept = 1.0 if a_next is None else a_next / a_s
    signal, spread = math.sqrt(kept * a_s), math.sqrt(kept * (1 - a_s))
    return Row(
        t=t,
        original=original,
        x=signal * original[0] + spread * x,
        out=signal * original[1] + spread * out,
        noise=None if a_next is None else math.sqrt(1 - kept),
    )
