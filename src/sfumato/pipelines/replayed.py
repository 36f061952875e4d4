"""Guidance as a graph of the device, recorded once and replayed while only the latents and the timestep change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sfumato.runtime.device import ran_out_of_memory, release_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from sfumato.models.blocks import Moment
    from sfumato.pipelines.guidance import Guidance
    from sfumato.pipelines.residuals import Read
    from sfumato.runtime.graphs import Capture

__all__ = ["Replayed"]

log = logging.getLogger("sfumato")

# Recording takes the host about as long as a step does; with fewer steps left, it is not worth it.
LEAST_STEPS = 3
# A guidance interval changes between two states; each recording keeps the memory of one call.
KEPT = 2


class Replayed:
    """`Guidance`, with the same arguments and results.

    The first step of a kind runs as always, which also loads and chooses kernels; the second is recorded.
    """

    def __init__(self, guidance: Guidance, capture: Capture | None, say: Callable[[str], None]) -> None:
        """capture: None runs every step as always. say: is told once if recording fails."""
        self.guidance, self.capture, self._say = guidance, capture, say
        self._known: dict[Hashable, _Recorded | None] = {}  # None: has run once

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Scaled latents (B, C, h, w) at timestep t -> the prediction (B, C, h, w)."""
        state = None if self.capture is None else self.guidance.state(x)
        if state is None:
            return self.guidance(x, t)
        if state not in self._known:
            output = self.guidance(x, t)
            state = self.guidance.state(x)  # with what the first call has prepared
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            if state is not None:
                self._known[state] = None
            return output
        recorded = self._known[state] or self._record(state, x, t)
        return self.guidance(x, t) if recorded is None else recorded(x, t)

    def _record(self, state: Hashable, x: Tensor, t: float) -> _Recorded | None:
        done, total = self.guidance.step
        layers = self.guidance.unet.modules()
        hooked = any(one._forward_hooks or one._forward_pre_hooks for one in layers)  # which run at each step
        if self.capture is None or hooked or total - done < LEAST_STEPS:
            return None
        try:
            self._known[state] = recorded = _Recorded(self.guidance, self.capture, x, t)
        except Exception as error:
            self.capture, self._known = None, {}
            release_memory(x.device)
            why = "memory ran out" if ran_out_of_memory(error) else str(error).splitlines()[0]
            self._say(f"steps were not recorded as a graph, but launched one by one: {why}")
            return None
        return recorded


class _Recorded:
    """A recorded call, with the tensors that it reads: latents, time embeddings and their projections."""

    def __init__(self, guidance: Guidance, capture: Capture, x: Tensor, t: float) -> None:
        self.guidance, self.x = guidance, x.clone()
        self.moments: list[tuple[Read, Moment]] = []
        for read in guidance.reads:
            moment = guidance.moment(x, t, read)
            # Compiled code expects a moment as it was in the first call, without projections.
            compiled = guidance.unet._compiled_call_impl is not None
            self.moments.append((read, moment.copied(() if compiled else moment.layers)))
        for read, moment in self.moments:
            read.moments.fixed = moment
        try:
            self._replay, self._output = capture(lambda: guidance(self.x, t))
        finally:
            for read, _ in self.moments:
                read.moments.fixed = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.x.copy_(x)
        for read, moment in self.moments:
            moment.load(self.guidance.moment(x, t, read))
        self._replay()
        return self._output.clone()
