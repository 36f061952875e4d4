"""Schedulers of few-step models, whose timesteps are a subset of those used in distillation: LCM and TCD."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.outputs import Output
from sfumato.schedulers.base import Stepped, Table, Timestep, logger
from sfumato.schedulers.noise import Generators, noise_for
from sfumato.schedulers.rows import Row, State, advance
from sfumato.schedulers.solvers.consistency import lcm_row, tcd_row
from sfumato.schedulers.timestep import TimestepScheduler

__all__ = ["ConsistencyScheduler", "LCMScheduler", "LCMSchedulerOutput", "TCDScheduler", "TCDSchedulerOutput"]


@dataclass(frozen=True, eq=False)
class LCMSchedulerOutput(Output):
    """The latents for the next step, and the denoised latents before noise was added."""

    prev_sample: Tensor
    denoised: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TCDSchedulerOutput(Output):
    """The latents for the next step, and the latents before noise was added."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class ConsistencyScheduler(TimestepScheduler):
    """Base of LCM and TCD: a run uses some of `original_inference_steps` evenly spaced training timesteps.

    Parity note: if custom timesteps are cut short by `strength`, steps are still counted from the whole list, so the
    last call of `step` adds noise as if another step followed. `table` does not, like the ecosystem's pipelines.
    """

    custom_grids = ("timesteps",)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
        sigmas: None = None,
    ) -> None:
        """Select n of the timesteps used in distillation, or set custom timesteps.

        original_inference_steps: number of steps in distillation; None for the config's value. strength: for
        image-to-image, the share of the schedule to use, counted from its end. Raises `UsageError` for more steps than
        there are.
        """
        n, custom = self._counted(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if not 0 <= strength <= 1:
            raise UsageError(f"set_timesteps: strength must be from 0 to 1, not {strength:g}")
        known = self._distilled(original_inference_steps, strength)
        if custom:
            grid = self._descending(custom["timesteps"])
            if off := sorted(set(grid[1:].tolist()) - set(known.tolist())):
                logger.warning("%s: the model was not distilled on timesteps %s", self.config.owner, off)
            grid = grid[n - min(int(n * strength), n) :]
        else:
            most = min(len(known), original_inference_steps or self.config.original_inference_steps)
            if n > most:
                raise UsageError(
                    f"set_timesteps: {n} steps, but {self.config.owner} has only {most} with this strength "
                    "and original_inference_steps; use fewer steps, or raise original_inference_steps"
                )
            grid = known[::-1][np.linspace(0, len(known), n, endpoint=False).astype(int)]
        if not len(grid):
            raise UsageError(f"set_timesteps: strength {strength:g} of {n} timesteps leaves none; raise it")
        self._install(n, grid, device)

    def _distilled(self, original: int | None, strength: float) -> np.ndarray:
        """Return the distillation timesteps in ascending order, up to the one where `strength` starts."""
        steps: int = self.config.original_inference_steps if original is None else original
        if not 1 <= steps <= len(self):
            raise UsageError(f"original_inference_steps must be from 1 to {len(self)}, not {steps}")
        return np.arange(1, int(steps * strength) + 1) * (len(self) // steps) - 1

    def _rows(self, start: int, **options: float) -> Sequence[Row]:
        entries, last = self.timesteps.tolist(), self._chosen_steps() - 1
        pairs = enumerate(zip(entries, [*entries[1:], None], strict=True))
        return [self._at(t, following, i != last, **options) for i, (t, following) in pairs if i >= start]

    def table(self, start: int = 0, *, eta: float = 0.0) -> Table:
        """Return the steps as numbers, as in the base class; the last row's noise is generated but not added."""
        table = super().table(start, eta=eta)
        return replace(table, rows=(*table.rows[:-1], _without_noise(table.rows[-1])))

    def _at(self, timestep: int, following: int | None, noised: bool, **options: float) -> Row:
        """Return the row of a timestep; `following` is the next (None after the last); `noised`: add noise there."""
        raise NotImplementedError

    def second_output(self, row: Row, sample: Tensor, model_output: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the latents y before noise was added: x' = sqrt(1 - n^2) y + n z."""
        return advance(replace(_without_noise(row), noise=None), State(sample), model_output).x


def _without_noise(row: Row) -> Row:
    """Return the row that ends at y, before noise is added; the noise is still generated."""
    kept = math.sqrt(1 - (row.noise or 0.0) ** 2)
    past = tuple(weight / kept for weight in row.past)
    return replace(row, x=row.x / kept, out=row.out / kept, past=past, noise=row.noise and 0.0)


class LCMScheduler(ConsistencyScheduler):
    """Latent consistency models (2310.04378): predict the clean latents, then add noise for the next step."""

    output = LCMSchedulerOutput

    def _at(self, timestep: int, following: int | None, noised: bool) -> Row:
        a_next = self._product(timestep if following is None else following) if noised else None
        config = self.config
        a, scaling = self._product(timestep), config.timestep_scaling
        return lcm_row(timestep, a, a_next, config.prediction_type, scaling, self._clip())


class TCDScheduler(ConsistencyScheduler):
    """Trajectory consistency distillation (2402.19159); `eta` (gamma in the paper) from 0 (no noise) to 1 (as in LCM).

    Parity note: if `original_inference_steps` is passed to `set_timesteps`, the grid is taken from all training
    timesteps.
    """

    output = TCDSchedulerOutput

    def _distilled(self, original: int | None, strength: float) -> np.ndarray:
        return super()._distilled(original, strength) if original is None else np.arange(int(len(self) * strength))

    def _at(self, timestep: int, following: int | None, noised: bool, eta: float = 0.3) -> Row:
        if not 0 <= eta <= 1:
            raise UsageError(f"eta must be from 0 to 1, not {eta:g}")
        to = following or 0
        # In float32, as in the ecosystem: if the product is close to an integer, the last bit decides.
        a_s = self._product(int(torch.floor((1 - eta) * torch.tensor(to))))
        a_next = self._product(to) if noised and eta > 0 else None
        return tcd_row(timestep, self._product(timestep), a_s, a_next, self.config.prediction_type)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Stepped:
        """Take one step; `eta` sets how far beyond the next timestep to denoise before noise is added back."""
        return self._step(self._row(timestep, eta=eta), model_output, sample, noise_for(sample, generator), return_dict)
