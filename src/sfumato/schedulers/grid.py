"""Noise grids: from the training betas to the timesteps and sigmas that a sampler visits.

Training tables are float32 torch tensors because their last bit decides timesteps after rounding; everything later
is float64 until the sigmas are rounded to float32 once, as the ecosystem does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfumato.schedulers.configs import SchedulerConfig

__all__ = [
    "beta_quantile", "respace", "sigma_to_t", "spaced_timesteps", "train_alphas_cumprod", "train_betas", "train_sigmas",
]  # fmt: skip

Array = np.ndarray


def train_betas(config: SchedulerConfig) -> Tensor:
    """Return the betas of the forward process, (num_train_timesteps,) float32, or as many as `trained_betas` has."""
    start, end, n = config.beta_start, config.beta_end, config.num_train_timesteps
    match config.beta_schedule:
        case _ if config.trained_betas is not None:
            betas = torch.tensor(config.trained_betas, dtype=torch.float32)
        case "linear":
            betas = torch.linspace(start, end, n, dtype=torch.float32)
        case "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
        case "sigmoid":
            betas = torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float32)) * (end - start) + start
        case name:
            bars = [_ALPHA_BARS[name](i / n) for i in range(n + 1)]
            betas = torch.tensor([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(n)], dtype=torch.float32)
    return _zero_terminal_snr(betas) if config.own("rescale_betas_zero_snr") else betas


def _cosine(u: float) -> float:
    """Cosine schedule of Improved DDPM, 2102.09672, equation 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Schedule with Laplace-distributed log-SNR, 2407.03297, table 1."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


_ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda u: math.exp(-12.0 * u),
}


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha bar) so that the last timestep is pure noise (2305.08891, algorithm 1)."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def train_alphas_cumprod(config: SchedulerConfig, betas: Tensor, *, finite: bool) -> Tensor:
    """Return the cumulative products of 1 - beta, float32.

    `finite` replaces a zero terminal SNR by a tiny value, for samplers that work in sigma.
    """
    products = (1.0 - betas).cumprod(0)
    if finite and config.own("rescale_betas_zero_snr"):
        products[-1] = 2**-24
    return products


def train_sigmas(alphas_cumprod: Tensor) -> Array:
    """Return sqrt((1 - a) / a), ascending, float32. In torch, because numpy's float32 power differs in the last bit."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def spaced_timesteps(config: SchedulerConfig, n: int, *, last: int | None = None, extra: int = 0) -> Array:
    """Return n timesteps in descending order (2305.08891, table 2), float64.

    `extra` more points are spaced, and the lowest ones dropped; `last` is the end of the usable timesteps. "trailing"
    keeps the ecosystem's arithmetic, which for some n (61, 103, 121, …) yields one step too many, ending at -1.
    """
    train = config.num_train_timesteps
    last = train if last is None else last
    match config.own("timestep_spacing", "linspace"):
        case "linspace":
            return np.linspace(0, last - 1, n + extra)[::-1][:n]
        case "leading":
            steps = (np.arange(n + extra) * (last // (n + extra)))[::-1][:n]
            return steps.astype(np.float64) + config.own("steps_offset", 0)
        case _:
            return np.arange(last, 0, -train / n).round() - 1


def sigma_to_t(sigmas: Array, log_sigmas: Array, *, single: bool = False) -> Array:
    """Return the (fractional) timesteps of sigmas, interpolated linearly in the log sigmas of training.

    With `single`, float32 sigmas stay float32 throughout, as the ecosystem passes them to the model in some samplers.
    """
    log_sigma = np.log(np.maximum(sigmas, sigmas.dtype.type(1e-10)))
    low = (np.searchsorted(log_sigmas, log_sigma, side="right") - 1).clip(0, len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    w = ((below - log_sigma) / (below - above)).clip(0, 1)
    index = low.astype(np.float32) if single else low
    return (1 - w) * index + w * (index + 1)


def respace(config: SchedulerConfig, sigmas: Array, n: int, *, bounded: bool = True) -> Array:
    """Return n sigmas from the first (largest) to the last of the given ones, float64.

    Karras: 2206.00364, equation 5, with rho = 7. Exponential: uniform in log sigma. Beta: 2407.12173 with
    alpha = beta = 0.6. If `bounded`, `sigma_min` and `sigma_max` of the config (also if kept from another scheduler)
    replace the bounds.
    """
    low, high = float(sigmas[-1]), float(sigmas[0])
    if bounded:
        low = low if config.get("sigma_min") is None else config["sigma_min"]
        high = high if config.get("sigma_max") is None else config["sigma_max"]
    ramp = np.linspace(0, 1, n)
    match config.respaced:
        case "use_karras_sigmas":
            return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        case "use_exponential_sigmas":
            return np.exp(np.linspace(math.log(high), math.log(low), n))
        case _:
            return np.array([low + beta_quantile(p) * (high - low) for p in 1 - ramp])


def beta_quantile(p: float, a: float = 0.6) -> float:
    """Return the quantile function of the symmetric Beta(a, a) distribution, for 0 < a < 1, accurate to about 1e-14.

    The power series of the distribution function at 0 converges fast up to 1/2; its first term starts Newton's method.
    """
    if p > 0.5:
        return 1.0 - beta_quantile(1.0 - p, a)
    norm = math.gamma(a) ** 2 / math.gamma(2 * a)
    x = min((a * p * norm) ** (1 / a), 0.5)
    for _ in range(12):
        term, total = 1.0, 1.0 / a
        for k in range(1, 60):
            term *= (k - a) / k * x
            total += term / (a + k)
        excess = x**a * total / norm - p
        x -= excess * norm * (x * (1 - x)) ** (1 - a)
    return x
