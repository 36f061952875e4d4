"""Schedulers of EDM models (arXiv 2206.00364): Euler and DPM-Solver++ multistep, on sigmas without betas.

The network is given x / sqrt(s^2 + s_data^2) and log(s) / 4, and its output F means x0 = c_skip x + c_out F (table 1).
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sfumato.schedulers.multistep import DPMSolverMultistepScheduler
from sfumato.schedulers.sigma import ChurnedScheduler, VEScheduler
from sfumato.schedulers.solvers.prediction import Grid

__all__ = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EDMScheduler"]


class EDMScheduler(VEScheduler):
    """Base of the EDM schedulers: sigmas between the config's bounds, on the ramp of equation 5 or log-uniform."""

    precision: ClassVar[torch.dtype] = torch.float32  # dtype of the ramp; sigmas are always float32
    ends_at_last: ClassVar[bool] = True  # "sigma_min" as final sigma: the ramp's last, not the config's

    def _train(self) -> None:
        self._set_ramp(torch.linspace(0, 1, len(self), dtype=self.precision), None)

    def _choose(self, n: int, device: Any) -> None:
        self._set_ramp(torch.linspace(0, 1, n, dtype=self.precision), device)

    def _set_ramp(self, ramp: Tensor, device: Any) -> None:
        # In torch: numpy's float32 power and logarithm differ in the last bit.
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if self.config.sigma_schedule == "karras":
            sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        else:
            sigmas = torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)
        points = sigmas.float().numpy()
        final = points[-1] if self.ends_at_last else low
        points = np.append(points, 0.0 if self.config.final_sigmas_type == "zero" else final)
        self._set_grid(len(ramp), (0.25 * sigmas.float().log()).numpy(), points, device)
        self.init_noise_sigma = math.sqrt(high * high + 1)

    def _grid(self, start: int) -> Grid:
        return replace(super()._grid(start), data=self.config.sigma_data)

    def _signal_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigmas), sigmas


class EDMEulerScheduler(EDMScheduler, ChurnedScheduler):
    """Euler steps in sigma with optional churn (2206.00364, algorithm 2 without the correction).

    `set_timesteps` takes no sigmas: what the ecosystem calls sigmas here are points on the ramp.
    """

    precision = torch.float64

    def _train(self) -> None:
        self._set_ramp(torch.arange(len(self) + 1, dtype=self.precision) / len(self), None)


class EDMDPMSolverMultistepScheduler(EDMScheduler, DPMSolverMultistepScheduler):
    """DPM-Solver++ of order 1 to 3, multistep, as ODE or SDE (2211.01095), with x = x0 + s eps."""

    divides = True
    ends_at_last = False
    custom_grids = ()
