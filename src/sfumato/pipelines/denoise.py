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
    """One finished step. index: from 0; latents (B, C, h, w): after the step; before, output: the U-Net's input and
    prediction.
    """

    index: int
    total: int
    row: Row
    latents: Tensor
    before: Tensor
    output: Tensor

    def original(self) -> Tensor:
        """Return the model's estimate of the clean latents (B, C, h, w) at this step, for previews."""
        return predict_original(self.row, self.before, self.output)


def denoise(
    predict: Callable[[Tensor, float], Tensor],
    rows: Sequence[Row],
    latents: Tensor,
    noise: Callable[[Row], Tensor],
    stops: Callable[[int], bool] = lambda index: False,
    after: Callable[[int, int, Tensor], Tensor] | None = None,
) -> Generator[DenoiseStep, Tensor | None, Tensor]:
    """Run the rows of a schedule on latents (B, C, h, w), and return the final latents.

    Yields after each step; latents that are sent back replace those of the step. stops(index): called before each step;
    ends the loop if true. after(index, total, latents): changes the latents after each step, as for a mask.
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
