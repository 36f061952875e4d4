"""What schedulers on a grid of sigmas share, and those in the variance-exploding form x = x0 + s eps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.errors import UsageError
from sfumato.schedulers.base import Scheduler, SchedulerOutput
from sfumato.schedulers.grid import respace, sigma_to_t, spaced_timesteps, train_sigmas
from sfumato.schedulers.noise import BrownianNoise, noise_for
from sfumato.schedulers.solvers import ve
from sfumato.schedulers.solvers.prediction import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.schedulers.noise import Generators
    from sfumato.schedulers.rows import Noise, Row

__all__ = [
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SigmaScheduler",
]


class SigmaScheduler(Scheduler):
    """A scheduler that keeps the sigma of every entry of `timesteps`, and the final one, in `sigmas`.

    Before `set_timesteps` both describe all training timesteps, for `add_noise`.
    """

    sigmas: Tensor  # float32, on the CPU

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._train_sigmas = train_sigmas(self.alphas_cumprod)
        self._log_sigmas = np.log(self._train_sigmas)
        n = len(self._train_sigmas)
        self._set_grid(n, np.arange(n - 1, -1, -1, dtype=np.float32), np.append(self._train_sigmas[::-1], 0), None)
        self.num_inference_steps = None

    def _set_grid(self, n: int, timesteps: np.ndarray, sigmas: np.ndarray, device: Any) -> None:
        points = sigmas.astype(np.float32)
        self._points = points.tolist()
        self._base_timesteps = timesteps.tolist()
        self.sigmas = torch.from_numpy(points)
        self._install(n, timesteps, device)

    def _grid(self, start: int) -> Grid:
        flow = bool(self.config.own("use_flow_sigmas"))
        first = start // self.order
        return Grid(self._base_timesteps, self._points, self.config.prediction_type, first, flow, self._clip())

    def _signal_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigmas), sigmas

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self._begin_index is None:
            schedule = self.timesteps.to(timesteps.device)
            indices = [self.index_for_timestep(timestep, schedule) for timestep in timesteps]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        return self._signal_noise(self.sigmas[indices])

    def _start_weights(self, start: int) -> tuple[float, float]:
        signal, noise = self._signal_noise(self.sigmas[start].double())
        return float(signal), float(noise)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents over sqrt(s^2 + 1): unit variance at any sigma."""
        c_in = self._row(self.timesteps[0] if timestep is None else timestep).c_in
        return sample if c_in == 1.0 else sample * c_in


class VEScheduler(SigmaScheduler):
    """Shared by the seven in x = x0 + s eps: n points spaced on the training timesteps, then a final sigma of 0."""

    point_type: type = np.float32
    rounds = False  # respaced timesteps to whole ones
    bounded = True  # Karras sigmas obey sigma_min and sigma_max

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting latents: the largest sigma; with "leading", of image and noise together."""
        largest = max(self._points)
        return (largest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else largest

    def _timestep_points(self, n: int, timesteps: Sequence[float] | None = None) -> np.ndarray:
        if timesteps is not None:
            return np.array(timesteps, dtype=self.point_type)
        config, train = self.config, len(self)
        points = spaced_timesteps(config.timestep_spacing, n, train, last=train, offset=config.steps_offset)
        return points.astype(self.point_type)

    def _interpolated(self, timesteps: np.ndarray, n: int) -> np.ndarray:
        return np.interp(timesteps, np.arange(len(self._train_sigmas)), self._train_sigmas)

    def _points_for(self, n: int, timesteps: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and sigmas of n steps, without the final sigma."""
        config = self.config
        if timesteps is not None and config.respaced:
            raise UsageError(f"{config.owner}: custom timesteps cannot be combined with {config.respaced}")
        points = self._timestep_points(n, timesteps)
        sigmas = self._interpolated(points, n)
        if config.respaced:
            bounded = self.bounded or config.respaced != "use_karras_sigmas"
            sigmas = respace(config, sigmas, n, bounded=bounded)
            points = sigma_to_t(sigmas, self._log_sigmas)
            points = points.round() if self.rounds and config.respaced == "use_karras_sigmas" else points
        return points, sigmas

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of n steps."""
        n = self._count(num_inference_steps)
        points, sigmas = self._points_for(n)
        self._set_grid(n, points.astype(np.float32), np.append(sigmas, 0.0), device)


class EulerDiscreteScheduler(VEScheduler):
    """Euler steps in sigma, optionally with EDM's churn (2206.00364, algorithm 2)."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid: of n steps, of given timesteps, or of given sigmas (the final one included)."""
        config = self.config
        n = self._count(num_inference_steps, timesteps, sigmas) - (sigmas is not None)
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        if continuous and timesteps is not None:
            raise UsageError("EulerDiscreteScheduler: custom timesteps cannot be combined with continuous ones")
        if sigmas is not None:
            values = np.array(sigmas, dtype=np.float32)
            points = sigma_to_t(values[:-1], self._log_sigmas)
        else:
            points, inner = self._points_for(n, timesteps)
            values = np.append(inner, self._train_sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0)
        if continuous:
            points = 0.25 * torch.from_numpy(values.astype(np.float32)[:-1]).log().numpy()
        self._set_grid(n, points.astype(np.float32), values, device)

    def _interpolated(self, timesteps: np.ndarray, n: int) -> np.ndarray:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps, n)
        # As in the ecosystem one point more than there are steps, so that the last step ends at sigma_min, not at 0.
        first, last = np.log(self._train_sigmas[[-1, 0]])
        return torch.linspace(first, last, n + 1, dtype=torch.float32).exp().numpy()

    def _rows(self, start: int, **churn: float) -> Sequence[Row]:
        return ve.euler(self._grid(start), ve.Churn(**churn))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step; with `s_churn` > 0, noise scaled by `s_noise` is added where s_tmin <= s <= s_tmax."""
        refuse_index(self, timestep)
        options = {"churn": s_churn, "tmin": s_tmin, "tmax": s_tmax, "noise": s_noise} if s_churn > 0 else {}
        noise = noise_for(sample, generator)
        return self._step(self._row(timestep, **options), model_output, sample, return_dict, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v-prediction target. Parity note: the products are looked up by *entry* of `timesteps`, not by timestep."""
        refuse_index(self, timesteps)
        entries = [self.index_for_timestep(timestep) for timestep in timesteps]
        products = self.alphas_cumprod[entries].view(-1, *(1,) * (sample.dim() - 1)).to(sample)
        return products.sqrt() * noise - (1 - products).sqrt() * sample


def refuse_index(scheduler: Scheduler, timestep: Any) -> None:
    """Raise where an integer, most likely a loop counter, is passed as a timestep to a scheduler with fractional ones."""
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        raise UsageError(f"{type(scheduler).__name__}: pass one of scheduler.timesteps, not an integer index")


class StochasticStep(VEScheduler):
    """A scheduler whose step draws Gaussian noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step with noise from a generator, one generator per image, or torch's default."""
        noise = noise_for(sample, generator)
        return self._step(self._row(timestep), model_output, sample, return_dict, noise)


class EulerAncestralDiscreteScheduler(StochasticStep):
    """Euler steps with ancestral noise."""

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.ancestral(self._grid(start))

    def step(self, model_output: Tensor, timestep: float | Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the base's, but an integer timestep is refused."""
        refuse_index(self, timestep)
        return super().step(model_output, timestep, *args, **kwargs)


class LMSDiscreteScheduler(VEScheduler):
    """Linear multistep of order up to 4 in sigma."""

    bounded = False

    def _rows(self, start: int, order: int = 4) -> Sequence[Row]:
        return ve.linear_multistep(self._grid(start), order)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step of at most this order."""
        return self._step(self._row(timestep, order=order), model_output, sample, return_dict)


class TwoCallScheduler(VEScheduler):
    """Two model calls a step, the last step one: 2n - 1 entries, the second of a step at `_mids[i]`."""

    order = 2

    def set_timesteps(
        self, num_inference_steps: int, device: Any = None, num_train_timesteps: int | None = None
    ) -> None:
        """Choose the grid of n steps."""
        if num_train_timesteps not in (None, len(self)):
            raise UsageError(f"{self.config.owner}: num_train_timesteps is the model's, {len(self)}")
        n = self._count(num_inference_steps)
        self._set_steps(n, *self._points_for(n), device)

    def _set_steps(self, n: int, points: np.ndarray, sigmas: np.ndarray, device: Any) -> None:
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
        raise NotImplementedError


class HeunDiscreteScheduler(TwoCallScheduler):
    """Heun's method in sigma (2206.00364, algorithm 1)."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid of n steps, or of given timesteps."""
        n = self._count(num_inference_steps, timesteps)
        points, sigmas = self._points_for(n, timesteps)
        self._set_steps(n, points.astype(np.float32), sigmas, device)

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        return points[1:]

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.heun(self._grid(start))


class KDPM2DiscreteScheduler(TwoCallScheduler):
    """DPM-Solver-2 in sigma (2206.00927, algorithm 1)."""

    rounds = True

    def _interleave(self, sigmas: np.ndarray) -> np.ndarray:
        return np.concatenate([sigmas[:1], sigmas[1:].repeat(2), sigmas[-1:]])

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        # In float32 torch and over the whole grid at once: the last bit, and so the model's timestep, depends on both.
        grid = torch.from_numpy(final)
        middles = grid.log().lerp(grid.roll(1).log(), 0.5).exp().numpy()
        return sigma_to_t(middles[1:-1], self._log_sigmas, single=True).astype(points.dtype)

    def _rows(self, start: int) -> Sequence[Row]:
        return ve.dpm2(self._grid(start), self._mids)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler, StochasticStep):
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
    """DPM-Solver++ as an SDE, driven by one Brownian path (2211.01095); needs torchsde (`pip install 'sfumato[sde]'`)."""

    point_type = np.float64
    bounded = False

    def _middles(self, points: np.ndarray, sigmas: np.ndarray, final: np.ndarray) -> np.ndarray:
        # The path is asked for float32 exp(log sigma), which is not always sigma; one bit off is another number.
        logs = torch.from_numpy(final[:-1]).log().neg()
        keys = logs.neg().exp()
        middles = (logs[:-1] + (logs[1:] - logs[:-1]) * 0.5).neg().exp()
        self._spans = list(zip(keys[:-1].tolist(), middles.tolist(), keys[1:].tolist(), strict=True))
        self._range = (float(final[:-1].min()), float(final.max()))
        times = -np.log(sigmas)
        return sigma_to_t(np.exp(-(times[:-1] + np.diff(times) * 0.5)), self._log_sigmas)

    def _reset(self) -> None:
        super()._reset()
        self._path: BrownianNoise | None = None

    def _rows(self, start: int, s_noise: float = 1.0) -> Sequence[Row]:
        return ve.dpm_sde(self._grid(start), self._mids, self._spans, s_noise)

    def noise_source(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> Noise:
        """One Brownian path seeded by `noise_sampler_seed`, else by the generator's seed (a list: a path per image)."""
        seed = self.config.noise_sampler_seed
        if seed is None and generators is not None:
            listed = isinstance(generators, (list, tuple))
            seed = [g.initial_seed() for g in generators] if listed else generators.initial_seed()
        return BrownianNoise(shape, self._range, seed, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one call's step; the path starts with the first, from `noise_sampler_seed` or torch's default generator."""
        row = self._row(timestep, s_noise=s_noise)
        if self._path is None:
            self._path = BrownianNoise(sample.shape, self._range, self.config.noise_sampler_seed, sample.device)
        return self._step(row, model_output, sample, return_dict, self._path)
