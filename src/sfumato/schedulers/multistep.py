"""Schedulers in the variance-preserving form x = alpha x0 + sigma eps: DPM-Solver, DEIS, UniPC."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import ConfigError, UsageError
from sfumato.schedulers.base import Timestep, logger
from sfumato.schedulers.grid import respace, sigma_to_t, spaced_timesteps
from sfumato.schedulers.rows import Row
from sfumato.schedulers.sigma import SigmaScheduler
from sfumato.schedulers.solvers.deis import deis
from sfumato.schedulers.solvers.dpm import dpm_solver
from sfumato.schedulers.solvers.unipc import unipc

__all__ = [
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "VPScheduler",
]  # fmt: skip


class VPScheduler(SigmaScheduler):
    """Base of DPM-Solver, DEIS and UniPC: integer timesteps and a final sigma set by the config.

    n + 1 points are spaced and the lowest is dropped.
    """

    gives_original = False
    ends_at_last: ClassVar[bool] = False  # final "sigma_min" is a respaced grid's last sigma, not that of training
    flows_karras: ClassVar[bool] = False  # with Karras and flow sigmas both on, convert Karras to flow
    rounds_cosine: ClassVar[bool] = True  # round the timesteps of Karras sigmas on a cosine schedule, too
    lowers_below: ClassVar[float] = 15  # `lower_order_final` has an effect below this number of steps

    def _signal_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.use_flow_sigmas:
            return 1 - sigmas, sigmas
        alpha = 1 / (sigmas**2 + 1) ** 0.5
        return alpha, sigmas * alpha

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep: the second of two, or the last index if it does not occur."""
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except UsageError:
            return len(self.timesteps) - 1

    def _spaced(self, n: int) -> np.ndarray:
        """Return timesteps in the config's spacing, up to where lambda passes `lambda_min_clipped`."""
        config, last = self.config, len(self)
        if (floor := config.own("lambda_min_clipped")) is not None:
            alphas = self.alphas_cumprod
            lambdas = torch.log(alphas.sqrt()) - torch.log((1 - alphas).sqrt())
            last -= int(torch.searchsorted(lambdas.flip(0), floor))
        return spaced_timesteps(config, n, last=last, extra=1).round()

    def _flow_noise(self, n: int) -> np.ndarray:
        """Return the noise weights at the n points of a rectified flow, before the shift."""
        return (1 - np.linspace(1, 1 / len(self), n + 1))[:0:-1]

    def _flow_sigmas(self, n: int, given: Sequence[float] | None) -> np.ndarray:
        shift = self.config.flow_shift
        noise = self._flow_noise(n) if given is None else np.array(given, dtype=np.float64)
        noise = shift * noise / (1 + (shift - 1) * noise)
        noise[0] -= 1e-6 if abs(noise[0] - 1) < 1e-6 else 0.0  # pure noise has no lambda
        return noise

    def _choose(
        self, n: int, device: Any, timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """Compute and install the grid; custom sigmas are flow sigmas without the final one."""
        config, table, flow = self.config, self._train_sigmas, self.config.use_flow_sigmas
        if self._spacing is not None:
            values = self._set_apart(n)
            self._set_grid(len(values), sigma_to_t(values, self._log_sigmas), np.append(values, 0.0), device)
            # In the variance-preserving form, initial noise has the weight of noise, not the largest sigma.
            self.init_noise_sigma = float(self._signal_noise(self.sigmas[0])[1])
            return
        self.init_noise_sigma = type(self).init_noise_sigma
        respaced = config.respaced or ("use_lu_lambdas" if config.own("use_lu_lambdas") else None)
        if timesteps is not None and (respaced or flow):
            raise UsageError(f"{config.owner}: custom timesteps cannot be used with {respaced or 'use_flow_sigmas'}")
        points = self._spaced(n) if timesteps is None else np.array(timesteps, dtype=np.int64)
        if respaced == "use_lu_lambdas":
            values = np.exp(np.linspace(self._log_sigmas[-1].item(), self._log_sigmas[0].item(), n))
        elif respaced:
            values = respace(config, table[::-1], n)
        elif flow:
            values = self._flow_sigmas(n, sigmas)
        else:
            values = np.interp(points, np.arange(len(table)), table)
        if flow and (not respaced or (self.flows_karras and config.use_karras_sigmas)):
            values = values / (values + 1) if respaced else values
            points = values * len(self)
        elif respaced:
            points = sigma_to_t(values, self._log_sigmas)
            whole = self.rounds_cosine or config.beta_schedule != "squaredcos_cap_v2"
            points = points.round() if whole and respaced in ("use_karras_sigmas", "use_lu_lambdas") else points
        final = values[-1] if self.ends_at_last and (respaced or flow) else table[0]
        final = 0.0 if config.own("final_sigmas_type") == "zero" else final
        self._set_grid(len(points), points.astype(np.int64), np.append(values, final), device)

    def _wanted_orders(self, n: int) -> list[int]:
        """Return the desired order of each of n steps."""
        config = self.config
        lowered = config.lower_order_final and n < self.lowers_below
        return [min(config.solver_order, n - i) if lowered else config.solver_order for i in range(n)]

    def _orders(self, start: int) -> list[int]:
        """Return the order of every step from `start`: the desired one, limited by the number of outputs so far."""
        wanted = self._wanted_orders(len(self.timesteps))
        return [min(order, calls) for calls, order in enumerate(wanted[start:], 1)]


class DPMSolverMultistepScheduler(VPScheduler):
    """DPM-Solver and DPM-Solver++ of order 1 to 3, multistep, as ODE or SDE (2206.00927, 2211.01095)."""

    custom_grids = ("timesteps",)
    rounds_cosine = False

    def _wanted_orders(self, n: int) -> list[int]:
        orders = super()._wanted_orders(n)
        if self.config.euler_at_final or self.config.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def _rows(self, start: int) -> Sequence[Row]:
        heun = self.config.solver_type == "heun"
        return dpm_solver(self._grid(start), self.config.algorithm_type, heun, self._orders(start), single=False)


class DPMSolverSinglestepScheduler(VPScheduler):
    """DPM-Solver and DPM-Solver++, singlestep: orders 1, 2, 3 in turn (2206.00927, 2211.01095); linspace spacing only.

    Parity note: if the order does not divide the number of steps, or for a final sigma of 0, `lower_order_final` is
    turned on in the config and stays on for later runs.
    """

    custom_grids = ("timesteps",)

    def _choose(self, n: int, device: Any, timesteps: Sequence[int] | None = None) -> None:
        super()._choose(n, device, timesteps)
        config = self.config
        if not config.lower_order_final and (n % config.solver_order or config.final_sigmas_type == "zero"):
            logger.warning("DPMSolverSinglestepScheduler: lower_order_final is turned on for %d steps", n)
            self.config = config.replace(lower_order_final=True)

    def _wanted_orders(self, n: int) -> list[int]:
        """Return orders 1, 2, …, p in turn; `lower_order_final` or a final sigma of 0 can lower the last order to 1."""
        config, p = self.config, self.config.solver_order
        orders = [i % p + 1 for i in range(n)]
        if (config.lower_order_final and n % p == 0) or config.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def _rows(self, start: int) -> Sequence[Row]:
        heun = self.config.solver_type == "heun"
        return dpm_solver(self._grid(start), self.config.algorithm_type, heun, self._orders(start), single=True)


class DEISMultistepScheduler(VPScheduler):
    """DEIS of order 1 to 3 in log rho (2204.13902); the last sigma is the smallest one of training, never 0."""

    ends_at_last = True

    def _rows(self, start: int) -> Sequence[Row]:
        return deis(self._grid(start), self._orders(start))


class UniPCMultistepScheduler(VPScheduler):
    """UniPC (2302.04867): a multistep predictor corrected by its own next output; `solver_p` replaces the predictor."""

    custom_grids = ("sigmas",)
    ends_at_last = flows_karras = True
    lowers_below = math.inf

    def _choose(self, n: int, device: Any, sigmas: Sequence[float] | None = None) -> None:
        if sigmas is not None and not self.config.use_flow_sigmas:
            raise UsageError("UniPCMultistepScheduler: custom sigmas need use_flow_sigmas")
        super()._choose(n, device, None, sigmas)
        if self.config.solver_p is not None:
            self.config.solver_p.set_timesteps(n, device=device)

    def _flow_noise(self, n: int) -> np.ndarray:
        return np.linspace(1, 1 / len(self), n + 1)[:-1]

    def _rows(self, start: int) -> Sequence[Row]:
        config = self.config
        rows = unipc(
            self._grid(start), self._orders(start), config.solver_type, config.predict_x0, config.disable_corrector
        )
        if config.solver_p is None:
            return rows
        steps = config.solver_p.table(start).rows
        if len(steps) != len(rows):
            raise ConfigError(f"UniPCMultistepScheduler: solver_p takes {len(steps)} steps, not {len(rows)}")
        return [replace(row, predictor=step) for row, step in zip(rows, steps, strict=True)]
