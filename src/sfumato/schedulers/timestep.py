"""Schedulers on the training timesteps: DDIM, DDPM, PNDM."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.schedulers.base import Scheduler, Stepped, Table, Timestep
from sfumato.schedulers.grid import spaced_timesteps
from sfumato.schedulers.noise import Generators, noise_for, noising
from sfumato.schedulers.rows import Row, State, folded
from sfumato.schedulers.solvers.discrete import ddim_row, ddpm_row, plms_row, prk_row
from sfumato.values import check_number

__all__ = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "TimestepScheduler"]


class TimestepScheduler(Scheduler):
    """Base of the schedulers on integer timesteps: x = sqrt(a_t) x0 + sqrt(1 - a_t) eps.

    A step is determined by its timestep alone.
    """

    finite_snr = False

    def _train(self) -> None:
        super()._train()
        self._products = self.alphas_cumprod.double().tolist()
        self.timesteps = torch.arange(len(self) - 1, -1, -1)

    def _spaced(self, n: int) -> np.ndarray:
        if n > len(self):
            raise UsageError(f"set_timesteps: steps must be at most {len(self)}, as in training, not {n}")
        return spaced_timesteps(self.config, n).round().astype(np.int64)

    def _choose(self, n: int, device: Any) -> None:
        self._install(n, self._spaced(n), device)

    def _descending(self, timesteps: Sequence[float]) -> np.ndarray:
        given = np.array(timesteps, dtype=np.int64)
        if (np.diff(given) >= 0).any() or given[0] >= len(self):
            raise UsageError(f"set_timesteps: timesteps must descend and start below {len(self)}")
        return given

    def table(self, start: int = 0, *, eta: float = 0.0) -> Table:
        """Return the steps as numbers, as in the base class.

        Also raises `UsageError` if `steps_offset` goes past the last training timestep.
        """
        if self.num_inference_steps is not None and int(self.timesteps.max()) >= len(self):
            raise UsageError(
                f"{self.num_inference_steps} steps with steps_offset {self.config.steps_offset} start at timestep "
                f"{int(self.timesteps.max())}, but the model was trained up to {len(self) - 1}; use fewer steps"
            )
        return super().table(start, eta=eta)

    def _product(self, timestep: int) -> float:
        """Return the cumulative product at a timestep; if negative, 1 or the first product (`set_alpha_to_one`)."""
        if timestep >= 0:
            return self._products[timestep]
        return 1.0 if self.config.own("set_alpha_to_one", True) else self._products[0]

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        timesteps = timesteps.to(self.alphas_cumprod.device).long()
        if (timesteps >= len(self)).any() or (timesteps < 0).any():
            raise UsageError(f"timesteps must be from 0 to {len(self) - 1}, not {timesteps.tolist()}")
        products = self.alphas_cumprod[timesteps]
        return products.sqrt(), (1 - products).sqrt()

    def _weights_at(self, entry: int) -> tuple[float, float]:
        product = self._products[int(self.timesteps[entry])]
        return product**0.5, (1 - product) ** 0.5

    def previous_timestep(self, timestep: Timestep) -> Timestep:
        """Return the run's next (lower) timestep (0-d), -1 after the last; before `set_timesteps`, `timestep` - 1."""
        if self.num_inference_steps is None:
            return timestep - 1
        following = self.index_for_timestep(timestep) + 1
        return self.timesteps[following] if following < len(self.timesteps) else torch.tensor(-1)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the v-prediction target sqrt(a) noise - sqrt(1 - a) sample for timesteps (B,).

        Source: Progressive Distillation (2202.00512, appendix D).
        """
        timesteps = noising(sample, noise, timesteps)
        return self.add_noise(noise, -sample, timesteps)


class DDIMScheduler(TimestepScheduler):
    """Denoising diffusion implicit models (2010.02502); `eta` between 0 (deterministic) and 1 (DDPM's noise)."""

    def _at(self, timestep: int, eta: float = 0.0, reclip: bool = False) -> Row:
        a_next = self._product(timestep - len(self) // self._chosen_steps())
        a, prediction = self._products[timestep], self.config.prediction_type
        return ddim_row(timestep, a, a_next, prediction, eta=eta, clip=self._clip(), reclip=reclip)

    def _rows(self, start: int, eta: float = 0.0) -> Sequence[Row]:
        return [self._at(t, eta) for t in self.timesteps[start:].tolist()]

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Stepped:
        """Take one step from any timestep; `variance_noise` replaces the generator's noise if eta > 0.

        Raises `UsageError` if both are given.
        """
        if eta > 0 and variance_noise is not None and generator is not None:
            raise UsageError("pass a generator or variance_noise, not both")
        check_number("timestep", timestep)
        row = folded(self._at(int(timestep), eta, use_clipped_model_output))
        return self._step(row, model_output, sample, noise_for(sample, generator, variance_noise), return_dict)


class DDPMScheduler(TimestepScheduler):
    """Denoising diffusion probabilistic models (2006.11239), on all training timesteps or fewer."""

    custom_grids = ("timesteps",)

    def _choose(self, n: int, device: Any, timesteps: Sequence[int] | None = None) -> None:
        if timesteps is None:
            return super()._choose(n, device)
        return self._install(n, self._descending(timesteps), device)

    def _at(self, timestep: int, following: int) -> Row:
        a, a_next = self._products[timestep], self._product(following)
        config = self.config
        return ddpm_row(timestep, a, a_next, config.prediction_type, config.variance_type, self._clip())

    def _rows(self, start: int) -> Sequence[Row]:
        timesteps = self.timesteps[start:].tolist()
        return [self._at(t, following) for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True)]

    def _row(self, timestep: Timestep) -> Row:
        check_number("timestep", timestep)
        self._check_reach()
        return folded(self._at(int(timestep), int(self.previous_timestep(int(timestep)))))


class PNDMScheduler(TimestepScheduler):
    """Pseudo numerical methods (2202.09778): linear multistep, after a Runge-Kutta warm-up unless `skip_prk_steps`.

    Parity note: calls are counted, not looked up. After a late start (image-to-image) the second call still repeats
    the first one's step, so the run lags its timesteps by one, as in the ecosystem.
    """

    gives_original = False
    prk_timesteps: Sequence[int] | np.ndarray = ()  # those of the Runge-Kutta calls, which come first
    plms_timesteps: Sequence[int] | np.ndarray = ()  # those of the other calls

    @property
    def counter(self) -> int:
        """Calls of the current run so far."""
        return self.step_index or 0

    @property
    def ets(self) -> list[Tensor]:
        """The past model outputs that the next multistep call reads, (B, C, H, W) each, the oldest first."""
        # Within a warm-up step, the outputs of its second and third calls come first, and are let go with the fourth.
        within = max(self.counter % 4 - 1, 0) if self.counter <= len(self.prk_timesteps) else 0
        return [] if self._state is None else list(reversed(self._state.past[within:]))

    @ets.setter
    def ets(self, outputs: Sequence[Tensor]) -> None:
        """Continue from other outputs, at most three of which are read."""
        self._state = replace(self._state or State(torch.empty(0)), past=tuple(reversed(outputs)))
        if outputs and not (len(self.prk_timesteps) or self.counter):
            self.step_index = len(outputs) + 1  # as after the calls that give as many

    def step_prk(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the next call of the Runge-Kutta warm-up, as `step` does. Raises `UsageError` after the last one."""
        if self._chosen_steps() and self.counter >= len(self.prk_timesteps):
            raise UsageError("step_prk: there is no warm-up call left, or skip_prk_steps is set; use step or step_plms")
        return self.step(model_output, timestep, sample, return_dict=return_dict)

    def step_plms(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Any:
        """Take a multistep call, as `step` does after the warm-up. Raises `UsageError` before it, without `ets`."""
        calls = self._chosen_steps() and len(self.prk_timesteps)
        if self.counter < calls and len(self.ets) < 3:
            raise UsageError(f"step_plms needs three past outputs; call step_prk for all {calls} prk_timesteps first")
        self.step_index = max(self.counter, calls)
        return self.step(model_output, timestep, sample, return_dict=return_dict)

    def _choose(self, n: int, device: Any) -> None:
        """Install n + 1 timesteps without Runge-Kutta steps, else n + 9 (which needs n of at least 4)."""
        ascending = self._spaced(n)[::-1]
        warm_up = np.empty(0, np.int64)
        if self.config.skip_prk_steps:
            timesteps = np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]
        else:
            if n < 4:
                raise UsageError(f"PNDMScheduler: Runge-Kutta steps need at least 4 steps, not {n}; set skip_prk_steps")
            halves = ascending[-4:].repeat(2) + np.tile([0, len(self) // n // 2], 4)
            warm_up = halves[:-1].repeat(2)[1:-1][::-1]
            timesteps = np.concatenate([warm_up, ascending[:-3][::-1]])
        self.prk_timesteps, self.plms_timesteps = np.split(timesteps, [len(warm_up)])
        self._install(n, timesteps, device)

    def _at(self, call: int, timestep: int) -> Row:
        ratio, prediction = len(self) // self._chosen_steps(), self.config.prediction_type
        if call < len(self.prk_timesteps):
            here, following = self.prk_timesteps[call // 4 * 4], timestep - (0 if call % 2 else ratio // 2)
            return prk_row(call, timestep, self._products[here], self._product(following), prediction)
        here, following = (timestep + ratio, timestep) if call == 1 else (timestep, timestep - ratio)
        history = 3 if len(self.prk_timesteps) else call - 1 if call else 0
        return plms_row(call, timestep, self._products[here], self._product(following), prediction, history)

    def _rows(self, start: int) -> Sequence[Row]:
        return [self._at(call, t) for call, t in enumerate(self.timesteps[start:].tolist())]

    def _row(self, timestep: Timestep) -> Row:
        check_number("timestep", timestep)
        self.step_index = self.step_index or 0  # counts calls, wherever the run starts
        return self._at(self.step_index, int(timestep))
