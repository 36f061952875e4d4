"""Where a step's noise comes from: generators, or a Brownian path that any two sigmas can be asked about.

Noise is always drawn in float32 and cast later, so the dtype of the latents does not change a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from sfumato.schedulers.rows import Noise, Row

    Generators = Generator | Sequence[Generator] | None

__all__ = ["BrownianNoise", "GaussianNoise", "noise_for"]


def noise_for(sample: Tensor, generators: Generators, given: Tensor | None = None) -> Noise:
    """A noise source shaped like these latents, or the noise the caller already has."""
    return GaussianNoise(sample.shape, generators, sample.device) if given is None else lambda _: given


class GaussianNoise:
    """Independent standard normal noise for every step.

    One generator draws the whole batch at once; a list has one generator an image, drawn in turn; None uses torch's
    default generator. Each draws on its own device. The numbers are those the ecosystem's float32 pipelines draw.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generators: Generators = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(generators, (list, tuple)) and len(generators) not in (1, shape[0]):
            raise UsageError(f"{len(generators)} generators for a batch of {shape[0]}: give one, or one per image")
        self.shape = tuple(shape)
        self.generators = generators
        self.device = torch.device(device or "cpu")

    def __call__(self, row: Row | None = None) -> Tensor:
        """Draw `shape` values in float32 on `device`."""
        generators = self.generators
        if isinstance(generators, (list, tuple)):
            if len(generators) > 1:
                return torch.cat([self._draw((1, *self.shape[1:]), generator) for generator in generators])
            generators = generators[0]
        return self._draw(self.shape, generators)

    def _draw(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.device)


class BrownianNoise:
    """Increments of one Brownian path over sigma, normalised to unit variance, for `DPMSolverSDEScheduler`.

    The path is fixed by its seed and the sigmas between which it runs, so that the two halves of a step, or two step
    counts, see the same noise. A list of seeds gives each image its own path: image k is that of a batch of one
    with seed k. None takes a seed from torch's default generator.
    """

    def __init__(
        self,
        shape: Sequence[int],
        sigma_range: tuple[float, float],
        seed: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        try:
            from torchsde import BrownianInterval
        except ImportError as error:
            raise MissingExtra("DPMSolverSDEScheduler needs torchsde: pip install 'sfumato[sde]'") from error
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched and len(seeds) != shape[0]:
            raise UsageError(f"{len(seeds)} seeds for a batch of {shape[0]}: give one, or one per image")
        low, high = (torch.tensor(sigma) for sigma in sigma_range)
        settings: dict[str, Any] = {"tol": 1e-6, "pool_size": 24, "halfway_tree": True, "dtype": torch.float32}
        size = tuple(shape[1:] if self.batched else shape)
        self.device = torch.device(device or "cpu")
        self.paths = [BrownianInterval(t0=low, t1=high, size=size, entropy=entropy, **settings) for entropy in seeds]

    def __call__(self, row: Row) -> Tensor:
        """The increment between the row's two sigmas over the square root of their distance, float32 on `device`."""
        if row.span is None:
            raise UsageError(f"the row at timestep {row.t:g} has no span of sigmas to draw Brownian noise for")
        start, end = (torch.tensor(sigma, dtype=torch.float32) for sigma in row.span)
        low, high = (start, end) if start < end else (end, start)
        increments = [path(low, high) for path in self.paths]
        total = torch.stack(increments) if self.batched else increments[0]
        if start > end:
            total = -total
        return (total / (end - start).abs().sqrt()).to(self.device)
