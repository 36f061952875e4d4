"""Random number sources: torch's generators, NumPy's stream as in Apple's Core ML runners, or CUDA's.

A source has `device`, `initial_seed`, `get_state` and `set_state`, like `torch.Generator`; `normal` accepts any source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.errors import UsageError
from sfumato.request import LARGEST_SEEDS
from sfumato.runtime.device import sent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.request import Noise

__all__ = [
    "NumpyGenerator", "PhiloxGenerator", "RandomSource", "TurnedGenerator", "generator_for", "normal", "philox",
    "slerp",
]  # fmt: skip


class NumpyGenerator:
    """NumPy's legacy stream of normal numbers: a Mersenne Twister and the polar method, in float64.

    Apple's runners generate their noise this way (`np.random.seed` and `np.random.randn`, and the same in Swift). All
    noise of a run, including that of the steps, comes from a single stream.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        """Start a stream from a seed between 0 and 2**32 - 1. Raises `UsageError` for any other seed."""
        if not 0 <= seed <= LARGEST_SEEDS["numpy"]:
            raise UsageError(f"NumPy's stream has seeds from 0 to 2**32 - 1, not {seed}")
        self._seed = seed
        self._stream = np.random.RandomState(seed)

    def initial_seed(self) -> int:
        """Return the initial seed."""
        return self._seed

    def get_state(self) -> Any:
        """Return the current state, for `set_state`."""
        return self._stream.get_state()

    def set_state(self, state: Any) -> None:
        """Restore a state from `get_state`."""
        self._stream.set_state(state)

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next standard normal numbers as float32, generated in float64."""
        return torch.from_numpy(self._stream.standard_normal(tuple(shape)).astype(np.float32))


class PhiloxGenerator:
    """The normal numbers of torch on an NVIDIA GPU: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller.

    Number i of call k comes from the counter (k, 0, i, 0), with the seed as the key, so that numbers are independent of
    one another. This holds for calls of up to as many numbers as the GPU runs threads at once, about 100,000: latents
    of 1024 × 1024 pixels have 65,536.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        """Start a stream from a seed between 0 and 2**64 - 1."""
        self._seed = seed
        self._draws = 0

    def initial_seed(self) -> int:
        """Return the initial seed."""
        return self._seed

    def get_state(self) -> Any:
        """Return the current state, for `set_state`."""
        return self._draws

    def set_state(self, state: Any) -> None:
        """Restore a state from `get_state`."""
        self._draws = state

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next standard normal numbers as float32."""
        n = int(np.prod(shape))
        counter = [np.full(n, self._draws), np.zeros(n), np.arange(n), np.zeros(n)]
        x, y, *_ = philox([part.astype(np.uint64) for part in counter], (self._seed & _LOW, self._seed >> 32))
        self._draws += 1
        # To (0, 1] and (0, 2 pi] in float32, as curand does.
        step = np.float32(2.0**-32)
        u = x.astype(np.float32) * step + step / 2
        v = y.astype(np.float32) * (step * np.float32(6.2831855)) + step * np.float32(6.2831855) / 2
        values = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)
        return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


_LOW = 0xFFFFFFFF


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Apply ten rounds of Philox 4x32 (Salmon et al., SC 2011, section 3.3) to four uint64 arrays of 32-bit values."""
    a, b, c, d = counter
    for number in range(10):
        first, second = ((key[i] + number * (0x9E3779B9, 0xBB67AE85)[i]) & _LOW for i in (0, 1))
        product, other = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (other >> np.uint64(32)) ^ b ^ np.uint64(first),
            other & np.uint64(_LOW),
            (product >> np.uint64(32)) ^ d ^ np.uint64(second),
            product & np.uint64(_LOW),
        )
    return [a, b, c, d]


class TurnedGenerator:
    """A source whose first call interpolates between two streams; later calls use `then`, or the first stream.

    Matches A1111: the initial noise is interpolated on the sphere between two seeds, and the noise of the steps may
    have a seed of its own.
    """

    device = torch.device("cpu")

    def __init__(
        self, first: Stream, *, towards: Stream | None = None, strength: float = 0.0, then: Stream | None = None
    ) -> None:
        self._first, self._towards, self._strength, self._then = first, towards, strength, then or first
        self._begun = False

    def initial_seed(self) -> int:
        """Return the seed of the first stream."""
        return self._first.initial_seed()

    def get_state(self) -> Any:
        """Return the current state of all streams, for `set_state`."""
        streams = (self._first, self._towards, self._then)
        return self._begun, [None if one is None else one.get_state() for one in streams]

    def set_state(self, state: Any) -> None:
        """Restore a state from `get_state`."""
        self._begun, states = state
        for stream, kept in zip((self._first, self._towards, self._then), states, strict=True):
            if stream is not None:
                stream.set_state(kept)

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Return the next standard normal numbers (…, h, w) as float32."""
        if self._begun:
            return normal(shape, self._then, self.device)
        self._begun = True
        noise = normal(shape, self._first, self.device)
        if self._towards is None:
            return noise
        return slerp(noise, normal(shape, self._towards, self.device), self._strength)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate from a to b on the sphere (Shoemake 1985), with one angle per column of the second-to-last dimension.

    Matches A1111, including its bug: nearly parallel tensors are mixed the wrong way around.
    """
    dot = (a / a.norm(dim=-2, keepdim=True) * (b / b.norm(dim=-2, keepdim=True))).sum(-2, keepdim=True)
    if dot.mean() > 0.9995:
        return a * share + b * (1 - share)
    angle = dot.acos()
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


Stream = torch.Generator | NumpyGenerator | PhiloxGenerator
RandomSource = Stream | TurnedGenerator


def generator_for(rng: str, seed: int, noise: Noise | None = None) -> RandomSource:
    """Return a new CPU source for a request's `rng` and `noise`."""
    first = _stream(rng, seed)
    if noise is None or (noise.variation_seed, noise.step_seed, noise.step_rng) == (None, None, None):
        return first
    towards = None if noise.variation_seed is None else _stream(rng, noise.variation_seed)
    own = noise.step_seed is not None or noise.step_rng is not None
    then = _stream(noise.step_rng or rng, seed + (noise.step_seed or 0)) if own else None
    return TurnedGenerator(first, towards=towards, strength=noise.variation_strength, then=then)


def _stream(rng: str, seed: int) -> Stream:
    seed %= LARGEST_SEEDS[rng] + 1
    if rng == "torch":
        return torch.Generator("cpu").manual_seed(seed)
    return NumpyGenerator(seed) if rng == "numpy" else PhiloxGenerator(seed)


def normal(shape: Sequence[int], source: RandomSource | None, device: torch.device) -> Tensor:
    """Return standard normal numbers as float32, generated on the source's device. None: torch's default generator."""
    if source is not None and not isinstance(source, torch.Generator):
        return sent(source.randn(shape), device)
    place = device if source is None else source.device
    return sent(torch.randn(tuple(shape), generator=source, device=place, dtype=torch.float32), device)
