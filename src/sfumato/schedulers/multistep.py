"""Schedulers in the variance-preserving form x = alpha x0 + sigma eps: DPM-Solver, DEIS, UniPC."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.errors import ConfigError, UsageError
from sfumato.schedulers.base import SchedulerOutput, logger
from sfumato.schedulers.grid import respace, sigma_to_t, spaced_timesteps
from sfumato.schedulers.noise import noise_for
from sfumato.schedulers.sigma import SigmaScheduler
from sfumato.schedulers.solvers import deis, dpm, unipc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.schedulers.noise import Generators
    from sfumato.schedulers.rows import Row

__all__ = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]


class VPScheduler(SigmaScheduler):
    """Shared by the four: n + 1 points spaced, the lowest dropped, whole timesteps, and a final sigma by config."""

    gives_original = False
    ends_at_last = False  # whether a final sigma_min repeats the last sigma of a respaced grid, or is the training's

    def _signal_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.use_flow_sigmas:
            return 1 - sigmas, sigmas
        alpha = 1 / (sigmas**2 + 1) ** 0.5
        return alpha, sigmas * alpha

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The entry a timestep stands at, the second of two; the last entry where it stands nowhere."""
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except UsageError:
            return len(self.timesteps) - 1

    def _spaced(self, n: int) -> np.ndarray:
        """Timesteps by the config's spacing, up to where lambda passes `lambda_min_clipped`."""
        config, train = self.config, len(self)
        last = train
        if (floor := config.own("lambda_min_clipped")) is not None:
            alphas = self.alphas_cumprod
            lambdas = torch.log(alphas.sqrt()) - torch.log((1 - alphas).sqrt())
            last -= int(torch.searchsorted(lambdas.flip(0), floor))
        spacing, offset = config.own("timestep_spacing", "linspace"), config.own("steps_offset", 0)
        return spaced_timesteps(spacing, n, train, last=last, offset=offset, extra=1).round()

    def _flow(self, n: int, sigmas: Sequence[float] | None = None) -> np.ndarray:
        shift, noise = self.config.flow_shift, 1 - np.linspace(1, 1 / len(self), n + 1)
        return (shift * noise / (1 + (shift - 1) * noise))[:0:-1]

    def _choose(
        self, n: int, device: Any, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None = None
    ) -> None:
        config, table = self.config, self._train_sigmas
        respaced = config.respaced or ("use_lu_lambdas" if config.own("use_lu_lambdas") else None)
        if timesteps is not None and (respaced or config.use_flow_sigmas):
            raise UsageError(
                f"{config.owner}: custom timesteps need an unrespaced grid, not {respaced or 'flow sigmas'}"
            )
        points = self._spaced(n) if timesteps is None else np.array(timesteps, dtype=np.int64)
        if respaced == "use_lu_lambdas":
            values = np.exp(np.linspace(self._log_sigmas[-1].item(), self._log_sigmas[0].item(), n))
        elif respaced:
            values = respace(config, table[::-1], n)
        elif config.use_flow_sigmas:
            values = self._flow(n, sigmas)
        else:
            values = np.interp(points, np.arange(len(table)), table)
        if respaced and not (config.use_flow_sigmas and self.flow_respaced(values)):
            points = sigma_to_t(values, self._log_sigmas)
            if self._rounds(respaced):
                points = points.round()
        elif config.use_flow_sigmas:
            values = values / (values + 1) if respaced else values
            points = values * len(self)
        final = values[-1] if self.ends_at_last and (respaced or config.use_flow_sigmas) else table[0]
        final = 0.0 if config.own("final_sigmas_type") == "zero" else final
        self._set_grid(len(points), points.astype(np.int64), np.append(values, final), device)

    def flow_respaced(self, values: np.ndarray) -> bool:
        return False

    def _rounds(self, respaced: str) -> bool:
        return respaced == "use_karras_sigmas"

    def _orders(self, start: int, wanted: Sequence[int]) -> list[int]:
        """The order of every step from `start`: what is wanted there, as far as outputs have been collected."""
        return [min(order, calls) for calls, order in enumerate(wanted[start:], 1)]


class DPMSolverMultistepScheduler(VPScheduler):
    """DPM-Solver and DPM-Solver++ of order 1 to 3, multistep, as ODE or SDE (2206.00927, 2211.01095)."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Choose the grid of n steps, or of given timesteps."""
        self._choose(self._count(num_inference_steps, timesteps), device, timesteps)

    def _rounds(self, respaced: str) -> bool:
        whole = respaced in ("use_karras_sigmas", "use_lu_lambdas")
        return whole and self.config.beta_schedule != "squaredcos_cap_v2"

    def _rows(self, start: int) -> Sequence[Row]:
        config, n = self.config, len(self.timesteps)
        wanted = [config.solver_order] * n
        lowered = config.lower_order_final and n < 15
        if lowered:
            wanted[-2:] = [min(order, 2) for order in wanted[-2:]]
        if lowered or config.euler_at_final or config.final_sigmas_type == "zero":
            wanted[-1] = 1
        orders = self._orders(start, wanted)
        return dpm.multistep(self._grid(start), config.algorithm_type, config.solver_type == "heun", orders)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step; the SDE algorithms draw from the generator unless `variance_noise` is given."""
        noise = noise_for(sample, generator, variance_noise)
        return self._step(self._row(timestep), model_output, sample, return_dict, noise)


class DPMSolverSinglestepScheduler(VPScheduler):
    """DPM-Solver and DPM-Solver++ in runs of orders 1, 2, 3 (2206.00927, 2211.01095); linspace spacing only.

    Parity note: a step count the order does not divide, or a final sigma of 0, turns `lower_order_final` on in the
    config, and it stays on for later runs.
    """

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Choose the grid of n steps, or of given timesteps."""
        n = self._count(num_inference_steps, timesteps)
        self._choose(n, device, timesteps)
        config = self.config
        if not config.lower_order_final and (n % config.solver_order or config.final_sigmas_type == "zero"):
            logger.warning("DPMSolverSinglestepScheduler: lower_order_final is turned on for %d steps", n)
            self.config = config.replace(lower_order_final=True)
        self._wanted = self._order_list(n)

    def _order_list(self, n: int) -> list[int]:
        """Orders 1, 2, …, p over and over; with `lower_order_final` the last run is broken off so that it ends low."""
        p = self.config.solver_order
        orders = [i % p + 1 for i in range(n)]
        if self.config.lower_order_final and n % p == 0 and p > 1:
            orders[-1] = 1
            if p == 3:
                orders[-3:] = [1, 2, 1]
        if self.config.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def _rows(self, start: int) -> Sequence[Row]:
        config = self.config
        orders = self._orders(start, self._wanted)
        return dpm.singlestep(self._grid(start), config.algorithm_type, config.solver_type == "heun", orders)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step; the SDE algorithm draws from the generator."""
        noise = noise_for(sample, generator)
        return self._step(self._row(timestep), model_output, sample, return_dict, noise)


class DEISMultistepScheduler(VPScheduler):
    """DEIS of order 1 to 3 in log rho (2204.13902); its grid ends at the training's first sigma, never at 0."""

    ends_at_last = True

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of n steps."""
        self._choose(self._count(num_inference_steps), device, None)

    def _rows(self, start: int) -> Sequence[Row]:
        config, n = self.config, len(self.timesteps)
        lowered = config.lower_order_final and n < 15
        wanted = [min(config.solver_order, n - i) if lowered else config.solver_order for i in range(n)]
        return deis.deis(self._grid(start), self._orders(start, wanted))


class UniPCMultistepScheduler(VPScheduler):
    """UniPC: a multistep predictor corrected by its own next output (2302.04867); `solver_p` replaces the predictor."""

    ends_at_last = True

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """Choose the grid of n steps, or, with flow sigmas, of given sigmas (the final one not included)."""
        n = self._count(num_inference_steps if sigmas is None else None, sigmas)
        if sigmas is not None and not self.config.use_flow_sigmas:
            raise UsageError("UniPCMultistepScheduler: custom sigmas need use_flow_sigmas")
        self._choose(n, device, None, sigmas)
        if self.config.solver_p is not None:
            self.config.solver_p.set_timesteps(n, device=device)

    def _flow(self, n: int, sigmas: Sequence[float] | None = None) -> np.ndarray:
        shift = self.config.flow_shift
        noise = np.linspace(1, 1 / len(self), n + 1)[:-1] if sigmas is None else np.array(sigmas, dtype=np.float64)
        noise = shift * noise / (1 + (shift - 1) * noise)
        noise[0] -= 1e-6 if abs(noise[0] - 1) < 1e-6 else 0.0  # pure noise has no lambda
        return noise

    def flow_respaced(self, values: np.ndarray) -> bool:
        return self.config.use_karras_sigmas

    def _rows(self, start: int) -> Sequence[Row]:
        config, n = self.config, len(self.timesteps)
        wanted = [
            min(config.solver_order, n - i) if config.lower_order_final else config.solver_order for i in range(n)
        ]
        rows = unipc.unipc(
            self._grid(start),
            self._orders(start, wanted),
            predict_x0=config.predict_x0,
            bh2=config.solver_type == "bh2",
            disable_corrector=config.disable_corrector,
        )
        if config.solver_p is None:
            return rows
        steps = config.solver_p.table(start).rows
        if len(steps) != len(rows):
            raise ConfigError(
                f"UniPCMultistepScheduler: solver_p takes {len(steps)} steps where {len(rows)} are needed"
            )
        return [replace(row, predictor=step) for row, step in zip(rows, steps, strict=True)]
