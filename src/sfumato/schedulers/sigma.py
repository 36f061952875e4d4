"""Base of schedulers on a grid of sigmas, and the variance-exploding ones, x = x0 + s eps."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.schedulers.base import Scheduler, Stepped, Timestep
from sfumato.schedulers.grid import respace, sigma_to_t, spaced_timesteps, train_sigmas
from sfumato.schedulers.noise import BrownianNoise, Generators, noise_for, noising
from sfumato.schedulers.rows import Noise, Row
from sfumato.schedulers.solvers import ve
from sfumato.schedulers.solvers.prediction import Grid
from sfumato.schedulers.spacings import spaced_sigmas

__all__ = [
    "ChurnedScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "SigmaScheduler", "TwoCallScheduler", "VEScheduler",
]  # fmt: skip


class SigmaScheduler(Scheduler):
    """A scheduler that keeps the sigma of every timestep, and the final one, in `sigmas`.

    Before `set_timesteps`, `sigmas` and `timesteps` cover all training timesteps, for `add_noise`.
    """

    sigmas: Tensor  # float32, on the CPU
    divides: ClassVar[bool] = True  # by differences between sigmas, which must therefore be distinct
    discards: ClassVar[bool] = False  # with `set_spacing`: space n + 1 steps and drop the last sigma
    _spacing: str | None = None  # the argument of `set_spacing` while it runs

    def set_spacing(self, spacing: str, n: int, device: Any = None) -> None:
        """Set the grid of n steps with a noise schedule of A1111 or ComfyUI, one of `sfumato.request.SPACINGS`."""
        self._counted(n, timesteps=None, sigmas=None)
        self._spacing = spacing
        try:
            with self._arithmetic():
                self._choose(n, device)
        finally:
            self._spacing = None

    def _set_apart(self, n: int) -> np.ndarray:
        """Return the sigmas of the spacing being set, without the final one."""
        spaced = spaced_sigmas(str(self._spacing), n + self.discards, self._train_sigmas)
        return spaced[:-1] if self.discards else spaced

    def _train(self) -> None:
        super()._train()
        self._train_sigmas = train_sigmas(self.alphas_cumprod)
        self._log_sigmas = np.log(self._train_sigmas)
        n = len(self._train_sigmas)
        self._set_grid(n, np.arange(n - 1, -1, -1, dtype=np.float32), np.append(self._train_sigmas[::-1], 0), None)

    def _set_grid(self, n: int, timesteps: np.ndarray, sigmas: np.ndarray, device: Any) -> None:
        points = sigmas.astype(np.float32)
        self._points = points.tolist()
        self._base_timesteps = timesteps.tolist()
        self.sigmas = torch.from_numpy(points)
        self._install(n, timesteps, device)

    def _grid(self, start: int) -> Grid:
        first, flow = start // self.order, self.config.own("use_flow_sigmas", False)
        inner = self._points[first:-1]
        if self.divides and len(set(inner)) < len(inner):
            fewer = range(min(len(self._points) - 2, len(self)), 0, -1)
            most = next((n for n in fewer if self._distinct(self._spaced(n))), 1)
            raise UsageError(f"{type(self).__name__}: a timestep occurs twice; use at most {most} steps")
        return Grid(self._base_timesteps, self._points, self.config.prediction_type, first, flow, self._clip())

    def _spaced(self, n: int) -> np.ndarray:
        """Return timesteps in the config's spacing."""
        return spaced_timesteps(self.config, n)

    def _distinct(self, timesteps: np.ndarray) -> bool:
        return len(np.unique(timesteps.clip(0, len(self) - 1))) == len(timesteps)

    def _signal_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigmas), sigmas

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self.begin_index is None:
            schedule = self.timesteps.to(timesteps.device)
            indices = [self.index_for_timestep(timestep, schedule) for timestep in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        return self._signal_noise(self.sigmas[indices])

    def _weights_at(self, entry: int) -> tuple[float, float]:
        signal, noise = self._signal_noise(self.sigmas[entry].double())
        return float(signal), float(noise)


class VEScheduler(SigmaScheduler):
    """Base of the schedulers in x = x0 + s eps: n points on the training timesteps, then a final sigma of 0."""

    divides = False
    timestep_type: ClassVar[type] = np.float32
    bounded: ClassVar[bool] = True  # sigma_min and sigma_max apply to Karras sigmas
    needs_grid = False
    refuses_index: ClassVar[bool] = False  # reject integer timesteps, most likely loop counters

    def _set_grid(self, n: int, timesteps: np.ndarray, sigmas: np.ndarray, device: Any) -> None:
        super()._set_grid(n, timesteps, sigmas, device)
        largest = self.sigmas.max()  # with "leading" spacing, the signal's variance is added
        leading = self.config.own("timestep_spacing") == "leading" and self._spacing is None
        self.init_noise_sigma = (largest**2 + 1) ** 0.5 if leading else largest

    def _interpolated(self, timesteps: np.ndarray, n: int) -> np.ndarray:
        return np.interp(timesteps, np.arange(len(self._train_sigmas)), self._train_sigmas)

    def _timesteps_of(self, sigmas: np.ndarray) -> np.ndarray:
        return sigma_to_t(sigmas, self._log_sigmas).astype(self.timestep_type)

    def _points_for(self, n: int, timesteps: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps and sigmas of n steps, without the final sigma."""
        config = self.config
        if self._spacing is not None:
            sigmas = self._set_apart(n)
            return self._timesteps_of(sigmas), sigmas
        if timesteps is not None and config.respaced:
            raise UsageError(f"{config.owner}: custom timesteps cannot be combined with {config.respaced}")
        spaced = self._spaced(n) if timesteps is None else timesteps
        points = np.array(spaced, dtype=self.timestep_type)
        sigmas = self._interpolated(points, n)
        if not config.respaced:
            return points, sigmas
        sigmas = respace(config, sigmas, n, bounded=self.bounded or config.respaced != "use_karras_sigmas")
        return self._timesteps_of(sigmas), sigmas

    def _choose(self, n: int, device: Any) -> None:
        points, sigmas = self._points_for(n)
        self._set_grid(n, points, np.append(sigmas, 0.0), device)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """Return the latents divided by sqrt(s^2 + 1), which gives unit variance at any sigma."""
        timestep = self.timesteps[0] if timestep is None else timestep
        return sample * self._row(float(timestep) if isinstance(timestep, int) else timestep).c_in

    def _refuse_index(self, timestep: Any) -> None:
        integer = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
        if self.refuses_index and integer:
            raise UsageError(f"{type(self).__name__}: pass one of scheduler.timesteps, not an integer index")

    def _row(self, timestep: Timestep, **options: Any) -> Row:
        self._refuse_index(timestep)
        return super()._row(timestep, **options)


class ChurnedScheduler(VEScheduler):
    """Euler steps in sigma with optional noise before each step, as in EDM (2206.00364, algorithm 2)."""

    refuses_index = True

    def _rows(self, start: int, given: bool = False, **churn: float) -> Sequence[Row]:
        grid = self._grid(start)
        return ve.euler(replace(grid, prediction="sample", clip=None) if given else grid, ve.Churn(**churn))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Stepped:
        """Take one step; with `s_churn` > 0, noise scaled by `s_noise` is added if s_tmin <= s <= s_tmax.

        `pred_original_sample` replaces the clean latents computed from the model output.
        """
        options: dict[str, Any] = {}
        if s_churn > 0:
            options = {"churn": s_churn, "tmin": s_tmin, "tmax": s_tmax, "noise": s_noise}
        if pred_original_sample is not None:
            options["given"], model_output = True, pred_original_sample
        row = self._row(timestep, **options)
        return self._step(row, model_output, sample, noise_for(sample, generator), return_dict)

    def second_output(self, row: Row, sample: Tensor, model_output: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the second value of `step`; the noise of churn is added to x, so it has the weight of x in x'."""
        churned = sample if z is None or not row.x else sample + z * ((row.noise or 0.0) / row.x)
        return super().second_output(row, churned, model_output)


class EulerDiscreteScheduler(ChurnedScheduler):
    """Euler steps in sigma with EDM's optional churn (2206.00364, algorithm 2)."""

    custom_grids = ("timesteps", "sigmas")

    def _choose(
        self, n: int, device: Any, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """Compute and install the grid; custom sigmas include the final one."""
        config = self.config
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        if continuous and timesteps is not None:
            raise UsageError("EulerDiscreteScheduler: custom timesteps cannot be combined with continuous ones")
        if sigmas is not None:
            values = np.array(sigmas, dtype=np.float32)
            points = self._timesteps_of(values[:-1])
        else:
            points, inner = self._points_for(n, timesteps)
            values = np.append(inner, self._train_sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0)
        if continuous:
            points = 0.25 * torch.from_numpy(values.astype(np.float32)[:-1]).log().numpy()
        self._set_grid(n if sigmas is None else n - 1, points, values, device)

    def _interpolated(self, timesteps: np.ndarray, n: int) -> np.ndarray:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps, n)
        # As in the ecosystem, there is one point more than steps, so that the last step ends at sigma_min, not 0.
        first, last = np.log(self._train_sigmas[[-1, 0]])
        return torch.linspace(first, last, n + 1, dtype=torch.float32).exp().numpy()

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the v-prediction target, in the shape of `sample`.

        Parity note: products are looked up by *index* in `timesteps`, not by timestep.
        """
        timesteps = noising(sample, noise, timesteps)
        self._refuse_index(timesteps)
        entries = [self.index_for_timestep(timestep) for timestep in timesteps]
        products = self.alphas_cumprod[entries].view(-1, *(1,) * (sample.dim() - 1)).to(sample)
        return products.sqrt() * noise - (1 - products).sqrt() * sample


class EulerAncestralDiscreteScheduler(VEScheduler):
    """Euler steps with ancestral noise."""

    refuses_index = True

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.ancestral(self._grid(start))


class LMSDiscreteScheduler(VEScheduler):
    """Linear multistep of order up to 4 in sigma."""

    divides = True
    bounded = False

    def _rows(self, start: int, order: int = 4) -> Sequence[Row]:
        return ve.linear_multistep(self._grid(start), order)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Stepped:
        """Take one step of at most the given order."""
        return self._step(self._row(timestep, order=order), model_output, sample, None, return_dict)


class TwoCallScheduler(VEScheduler):
    """Two model calls per step except the last, so 2n - 1 timesteps; the second call of step i is at `_mids[i]`."""

    order = 2

    def _train(self) -> None:
        super()._train()
        with self._arithmetic():
            self._choose(len(self), None)

    def _choose(self, n: int, device: Any, timesteps: Sequence[float] | None = None) -> None:
        points, sigmas = self._points_for(n, timesteps)
        final = np.append(sigmas, 0.0).astype(np.float32)
        mids = self._middles(points, sigmas, final)
        self._set_grid(n, points, final, device)
        self._mids = mids.tolist()
        entries = np.empty(2 * len(points) - 1, dtype=points.dtype)
        entries[0::2], entries[1::2] = points, mids
        self._install(n, entries, device)
        self.sigmas = torch.from_numpy(self._interleave(final))

    def _interleave(self, sigmas: np.ndarray) -> np.ndarray:
        return np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2), sigmas[-1:]])

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        """Return the timesteps of the second calls, given those of the first calls (`points`)."""
        raise NotImplementedError


class HeunDiscreteScheduler(TwoCallScheduler):
    """Heun's method in sigma (2206.00364, algorithm 1)."""

    custom_grids = ("timesteps",)

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        return points[1:]

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.heun(self._grid(start))


class KDPM2DiscreteScheduler(TwoCallScheduler):
    """DPM-Solver-2 in sigma (2206.00927, algorithm 1)."""

    discards = True

    def _timesteps_of(self, sigmas: np.ndarray) -> np.ndarray:
        timesteps = sigma_to_t(sigmas, self._log_sigmas)  # float64, as in the ecosystem
        return timesteps.round() if self.config.respaced == "use_karras_sigmas" else timesteps

    def _interleave(self, sigmas: np.ndarray) -> np.ndarray:
        return np.concatenate([sigmas[:1], sigmas[1:].repeat(2), sigmas[-1:]])

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        # In float32 torch and over the whole grid: the last bit, and with it the model's timestep, depends on both.
        grid = torch.from_numpy(final)
        middles = grid.log().lerp(grid.roll(1).log(), 0.5).exp().numpy()
        return sigma_to_t(middles[1:-1], self._log_sigmas, single=True).astype(points.dtype)

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.dpm2(self._grid(start), self._mids)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 with ancestral noise."""

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        grid = torch.from_numpy(final)
        following = torch.cat([grid[1:], grid[-1:]])
        up = (following**2 * (grid**2 - following**2) / grid**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        middles = grid.log().lerp(down.log(), 0.5).exp().numpy()
        return sigma_to_t(middles[:-2], self._log_sigmas, single=True).astype(points.dtype)

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.dpm2(self._grid(start), self._mids, ancestral=True)


class DPMSolverSDEScheduler(TwoCallScheduler):
    """DPM-Solver++ as an SDE, driven by one Brownian path (2211.01095); needs `pip install 'sfumato[sde]'`."""

    divides = True
    timestep_type = np.float64
    bounded = False

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        # The path is evaluated at float32 exp(log sigma), which may differ from sigma; one bit changes the noise.
        logs = torch.from_numpy(final[:-1]).log().neg()
        keys = logs.neg().exp()
        middles = (logs[:-1] + (logs[1:] - logs[:-1]) * 0.5).neg().exp()
        self._spans = list(zip(keys[:-1].tolist(), middles.tolist(), keys[1:].tolist(), strict=True))
        self._range = (float(final[:-1].min()), float(final.max()))
        times = -np.log(sigmas)
        return sigma_to_t(np.exp(-(times[:-1] + np.diff(times) * 0.5)), self._log_sigmas)

    def _reset(self) -> None:
        super()._reset()
        self._path: Noise | None = None

    def _rows(self, start: int, s_noise: float = 1.0) -> Sequence[Row]:
        return ve.dpm_sde(self._grid(start), self._mids, self._spans, s_noise)

    def noise_source(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> Noise:
        """Return a Brownian path seeded by `noise_sampler_seed`, else by the generator (a list: one path per image)."""
        seed = self.config.noise_sampler_seed
        if seed is None and generators is not None:
            several = isinstance(generators, Sequence)
            seed = [each.initial_seed() for each in generators] if several else generators.initial_seed()
        return BrownianNoise(shape, self._range, seed, device)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0
    ) -> Stepped:
        """Take one step; the first one seeds the path with `noise_sampler_seed` or torch's default generator."""
        row = self._row(timestep, s_noise=s_noise)
        if self._path is None:
            self._path = self.noise_source(sample.shape, None, sample.device)
        return self._step(row, model_output, sample, self._path, return_dict)
