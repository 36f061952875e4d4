"""The noise of a step: from generators, or from a Brownian path that can be sampled between any two sigmas.

Noise is always drawn in float32 and cast later, so the dtype of the latents does not change an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import MissingExtra, UsageError
from sfumato.runtime.generators import RandomSource, normal
from sfumato.schedulers.rows import Noise, Row
from sfumato.values import shown

Generators = RandomSource | Sequence[RandomSource] | None
Seeds = int | Sequence[int] | None

__all__ = ["BrownianNoise", "GaussianNoise", "noise_for", "noising"]


def noising(original: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
    """Return the timesteps (B,) of `add_noise` and `get_velocity`, which can be plain numbers; raises `UsageError`."""
    try:
        found = torch.as_tensor(timesteps).flatten()
        torch.broadcast_shapes(original.shape, noise.shape, (len(found), *(1,) * (original.dim() - 1)))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        given = (original, noise, timesteps)
        what = ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else shown(one) for one in given)
        raise UsageError(
            f"latents and noise must be tensors of the same shape, with one timestep per image, not {what}"
        ) from error
    return found


def noise_for(sample: Tensor, generators: Generators, given: Tensor | None = None) -> Noise:
    """Return a noise source of the shape of these latents, or one that returns the `given` noise."""
    return GaussianNoise(sample.shape, generators, sample.device) if given is None else lambda _: given


class GaussianNoise:
    """Independent standard normal noise for every step.

    One generator fills the whole batch at once; a list has one generator per image, used in order; None uses torch's
    default generator. Each generates on its own device. The values equal those of the ecosystem's float32 pipelines.
    """

    def __init__(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> None:
        if isinstance(generators, Sequence):
            if len(generators) not in (1, shape[0]):
                raise UsageError(f"{len(generators)} generators for a batch of {shape[0]}; pass one, or one per image")
            generators = generators[0] if len(generators) == 1 else generators
        self.shape = tuple(shape)
        self.generators = generators
        self.device = torch.device(device or "cpu")

    def __call__(self, row: Row | None = None) -> Tensor:
        """Generate `shape` values in float32 on `device`."""
        if not isinstance(self.generators, Sequence):
            return normal(self.shape, self.generators, self.device)
        return torch.cat([normal((1, *self.shape[1:]), generator, self.device) for generator in self.generators])


class BrownianNoise:
    """Increments of one Brownian path over sigma, normalized to unit variance, for `DPMSolverSDEScheduler`.

    The seed and the first and last sigma determine the path, so both halves of a step, or different numbers of steps,
    see the same noise. A list of seeds gives each image its own path: image k equals that of a batch of one with
    seed k. None draws a seed from torch's default generator. Raises `MissingExtra` if torchsde is not installed.
    """

    def __init__(
        self, shape: Sequence[int], sigma_range: tuple[float, float], seed: Seeds = None, device: Any = None
    ) -> None:
        try:
            from torchsde import BrownianInterval
        except ImportError as error:
            raise MissingExtra("DPMSolverSDEScheduler needs torchsde: pip install 'sfumato[sde]'") from error
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        single = isinstance(seed, int)
        seeds = [seed] if single else list(seed)
        if not single and len(seeds) != shape[0]:
            raise UsageError(f"{len(seeds)} seeds for a batch of {shape[0]}; pass one, or one per image")
        settings: dict[str, Any] = {"tol": 1e-6, "pool_size": 24, "halfway_tree": True, "dtype": torch.float32}
        settings |= {"t0": torch.tensor(sigma_range[0]), "t1": torch.tensor(sigma_range[1])}
        # torchsde rounds the ends to its tolerance, and warns about a sigma that is then out of range.
        self.low, self.high = (round(sigma, 6) for sigma in sigma_range)
        self.shape = tuple(shape)
        size = self.shape if single else self.shape[1:]
        self.device = torch.device(device or "cpu")
        self.paths = [BrownianInterval(size=size, entropy=entropy, **settings) for entropy in seeds]

    def __call__(self, row: Row) -> Tensor:
        """Return the increment between the row's two sigmas over the root of their distance, float32 on `device`."""
        if row.span is None:
            raise UsageError(f"the row at timestep {row.t:g} has no span of sigmas to draw Brownian noise for")
        high, low = (min(max(sigma, self.low), self.high) for sigma in row.span)
        increments: list[Any] = [path(low, high) for path in self.paths]
        distance = torch.tensor(row.span[0], dtype=torch.float32) - torch.tensor(row.span[1], dtype=torch.float32)
        return -(torch.stack(increments).view(self.shape) / distance.sqrt()).to(self.device)
