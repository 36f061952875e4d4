"""Where random numbers come from: torch's generators, or the stream that Apple's Core ML runners draw from.

A source is anything with torch's own `device`, `initial_seed`, `get_state` and `set_state`; `normal` draws from any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.errors import UsageError
from sfumato.request import LARGEST_SEEDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["NumpyGenerator", "RandomSource", "generator_for", "normal"]


class NumpyGenerator:
    """NumPy's legacy stream of normal numbers: a Mersenne Twister and the polar method, in float64.

    Apple's runners draw their noise from it (`np.random.seed` and `np.random.randn`, and the same written in Swift).
    Whatever a run draws, noise of the steps included, goes on in the one stream.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        """Begin the stream of a seed from 0 to 2**32 - 1; raises `UsageError` for another one."""
        if not 0 <= seed <= LARGEST_SEEDS["numpy"]:
            raise UsageError(f"NumPy's stream has seeds from 0 to 2**32 - 1, not {seed}")
        self._seed = seed
        self._stream = np.random.RandomState(seed)

    def initial_seed(self) -> int:
        """The seed it began with."""
        return self._seed

    def get_state(self) -> Any:
        """Where the stream stands now, for `set_state`."""
        return self._stream.get_state()

    def set_state(self, state: Any) -> None:
        """Go back to where `get_state` was called."""
        self._stream.set_state(state)

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal numbers, drawn in float64 and rounded to float32."""
        return torch.from_numpy(self._stream.standard_normal(tuple(shape)).astype(np.float32))


RandomSource = torch.Generator | NumpyGenerator


def generator_for(rng: str, seed: int) -> RandomSource:
    """The source that a request's `rng` names, at its beginning, on the CPU."""
    return NumpyGenerator(seed) if rng == "numpy" else torch.Generator("cpu").manual_seed(seed)


def normal(shape: Sequence[int], source: RandomSource | None, device: torch.device) -> Tensor:
    """Standard normal numbers in float32 on a device, drawn where the source is; None is torch's default one there."""
    if isinstance(source, NumpyGenerator):
        return source.randn(shape).to(device)
    place = device if source is None else source.device
    return torch.randn(tuple(shape), generator=source, device=place, dtype=torch.float32).to(device)
