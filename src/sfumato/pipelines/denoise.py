"""The denoising loop. There is only one, and it is a generator: callers handle progress, previews and cancelling."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.schedulers.rows import Row, State, advance, predict_original

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["DenoiseStep", "denoise"]


@dataclass(frozen=True)
class DenoiseStep:
    """One finished step: its place, its timestep, and the latents (B, C, h, w) after it."""

    index: int
    total: int
    row: Row
    latents: Tensor
    before: Tensor
    output: Tensor

    def original(self) -> Tensor:
        """The clean latents (B, C, h, w) that the model had in mind at this step, for previews."""
        return predict_original(self.row, self.before, self.output)


def denoise(
    predict: Callable[[Tensor, float], Tensor],
    rows: Sequence[Row],
    latents: Tensor,
    noise: Callable[[Row], Tensor],
    stops: Callable[[int], bool] = lambda index: False,
    after: Callable[[int, int, Tensor], Tensor] | None = None,
) -> Generator[DenoiseStep, Tensor | None, Tensor]:
    """Run the rows of a schedule from the given latents (B, C, h, w) to the last ones, which it returns.

    Yields after each step; latents sent back in replace those of the step. `stops` is asked before each step, counted
    from 0, whether the loop ends there; `after` changes the latents after a step of how many, as a mask does.
    """
    state = State(latents)
    for index, row in enumerate(rows):
        if stops(index):
            break
        with torch.no_grad():
            x = state.x
            output = predict(x if row.c_in == 1 else x * row.c_in, row.t)
            state = advance(row, state, output, noise)
            state = state if after is None else state.with_x(after(index, len(rows), state.x))
        edited = yield DenoiseStep(index, len(rows), row, state.x, x, output)
        if edited is not None:
            state = state.with_x(edited.to(state.x))
    return state.x
