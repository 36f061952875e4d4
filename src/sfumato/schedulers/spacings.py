"""A1111's and ComfyUI's step spacings (k-diffusion's formulas), available with any sampler."""

from __future__ import annotations

import numpy as np

from sfumato.schedulers.grid import beta_quantile

__all__ = ["spaced_sigmas"]

Array = np.ndarray


def spaced_sigmas(spacing: str, n: int, table: Array) -> Array:
    """Return the sigmas of n steps in descending order, without the final 0, float64.

    table: the sigmas of training, ascending; log sigma is interpolated between them. Karras: 2206.00364, equation 5,
    with rho = 7. "ddim_uniform" takes every floor(T / n)-th sigma and can yield more than n steps, as in A1111 and
    ComfyUI.
    """
    sigmas = table.astype(np.float64)
    last, high, low = len(sigmas) - 1, sigmas[-1], sigmas[0]
    ramp = np.linspace(0, 1, n)

    def at(timesteps: Array) -> Array:
        return np.exp(np.interp(timesteps, np.arange(last + 1), np.log(sigmas)))

    match spacing:
        case "karras":
            return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        case "exponential":
            return np.exp(np.linspace(np.log(high), np.log(low), n))
        case "sgm_uniform":
            return at(np.linspace(last, 0, n + 1)[:-1])
        case "simple":
            return sigmas[[-(1 + int(i * (len(sigmas) / n))) for i in range(n)]]
        case "ddim_uniform":
            return sigmas[1 :: max(len(sigmas) // n, 1)][::-1]
        case "beta":
            return np.array([low + beta_quantile(p) * (high - low) for p in 1 - ramp])
        case _:
            return at(np.linspace(last, 0, n))
