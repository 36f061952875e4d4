"""Samplers on the training timesteps themselves: DDIM, DDPM and PNDM. One function makes the row of one timestep.

x = sqrt(a) x0 + sqrt(1 - a) eps, with a the cumulative product of alphas there and a' (`a_next`) where the step leads.
"""

from __future__ import annotations

import math

from sfumato.schedulers.rows import Clip, LearnedVariance, Row
from sfumato.schedulers.solvers.prediction import noise_from, vp_original

__all__ = ["ddim_row", "ddpm_row", "plms_row", "prk_row"]


def ddim_row(
    t: float,
    a: float,
    a_next: float,
    prediction: str,
    *,
    eta: float = 0.0,
    clip: Clip | None = None,
    reclip: bool = False,
) -> Row:
    """DDIM: x' = sqrt(a') x0 + sqrt(1 - a' - sd^2) eps + sd z (2010.02502, equations 12 and 16).

    sd = eta sqrt((1 - a') / (1 - a) (1 - a / a')). x0 may be clipped; eps is still the model's unless `reclip`
    derives it from the clipped x0.
    """
    alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
    sd = eta * math.sqrt(max((1 - a_next) / (1 - a) * (1 - a / a_next), 0.0))
    direction = math.sqrt(max(1 - a_next - sd * sd, 0.0))
    original = vp_original(prediction, alpha, sigma)
    common = {"t": t, "original": original, "convert": original, "clip": clip, "noise": sd if eta > 0 else None}
    if reclip:
        return Row(**common, x=direction / sigma, past=(math.sqrt(a_next) - direction * alpha / sigma,))
    x, out = noise_from(prediction, original, alpha, sigma)
    return Row(**common, x=direction * x, out=direction * out, past=(math.sqrt(a_next),))


def ddpm_row(t: float, a: float, a_next: float, prediction: str, variance: str, clip: Clip | None = None) -> Row:
    """DDPM: sample q(x' | x, x0) (2006.11239, equations 6-7; learned variance: 2102.09672, equation 15).

    Parity notes: noise is generated wherever t > 0, even for the last step's weight of 1e-10. "fixed_large_log" is the
    standard deviation, as its name says; the ecosystem takes the root of a logarithm there and returns NaN.
    """
    step = a / a_next
    beta = 1 - step
    posterior = max((1 - a_next) / (1 - a) * beta, 1e-20)
    original = vp_original(prediction, math.sqrt(a), math.sqrt(1 - a))
    learned = None
    if t <= 0:
        noise = None
    elif variance.startswith("learned"):
        noise = 1.0
        learned = LearnedVariance((math.log(posterior), math.log(beta)) if variance == "learned_range" else None)
    else:
        noise = math.sqrt(beta if variance.startswith("fixed_large") else posterior)
    x, past = math.sqrt(step) * (1 - a_next) / (1 - a), (math.sqrt(a_next) * beta / (1 - a),)
    return Row(t=t, original=original, convert=original, x=x, past=past, noise=noise, clip=clip, learned=learned)


def _transfer(a: float, a_next: float, prediction: str) -> tuple[float, float]:
    """Return the weights of x and of the combined outputs in PNDM's transfer x -> x' (2202.09778, equation 11)."""
    x = math.sqrt(a_next / a)
    eps = -(a_next - a) / (a * math.sqrt(1 - a_next) + math.sqrt(a * (1 - a) * a_next))
    return (x, eps) if prediction == "epsilon" else (x + eps * math.sqrt(1 - a), eps * math.sqrt(a))


# Indexed by the number of earlier outputs.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms_row(call: int, t: float, a: float, a_next: float, prediction: str, history: int) -> Row:
    """Linear multistep that combines outputs before the transfer (PNDM, 2202.09778, equations 12-13).

    `call` counts model calls, `history` the outputs kept. Call 1 repeats the step of call 0 from the saved x with the
    mean of both outputs, and its own output is not kept. v-predictions are combined first and converted after that.
    """
    original = vp_original(prediction, math.sqrt(a), math.sqrt(1 - a))
    x, out = _transfer(a, a_next, prediction)
    if call == 1:
        return Row(t=t, original=original, x=0.0, saved=x, past=(out / 2, out / 2), keep=(1, 2))
    past = tuple(out * w for w in ADAMS_BASHFORTH[min(history, 3)])
    return Row(t=t, original=original, x=x, past=past, save=call == 0, keep=(0, 3))


def prk_row(call: int, t: float, a: float, a_next: float, prediction: str) -> Row:
    """Pseudo Runge-Kutta warm-up, four calls per step from one saved x (PNDM, 2202.09778, equation 13).

    The fourth call combines (k1 + 2 k2 + 2 k3 + k4) / 6; of the four outputs, only k1 stays in the history.
    """
    original = vp_original(prediction, math.sqrt(a), math.sqrt(1 - a))
    x, out = _transfer(a, a_next, prediction)
    stage = call % 4
    if stage == 0:
        return Row(t=t, original=original, x=x, past=(out,), save=True, keep=(0, 3))
    if stage < 3:
        return Row(t=t, original=original, x=0.0, saved=x, past=(out,), keep=(0, 3 + stage))
    past = (out / 6, out / 3, out / 3, out / 6)
    return Row(t=t, original=original, x=0.0, saved=x, past=past, keep=(3, 6))
