"""One sampling step as a row of numbers, and `advance`, which runs any of them.

Every sampler here is linear: the next latents are a weighted sum of the current ones, of latents saved earlier, of the
model's past outputs and of noise, with weights that depend only on the noise grid. A *builder* (in `solvers/`) computes
them once, in float64, as `Row`s; `advance` is then the same few tensor operations for all samplers, without a branch on
the sampler's name, without waiting for the device and without float64 on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.values import shown

__all__ = ["Clip", "LearnedVariance", "Row", "State", "advance", "folded", "predict_original"]

Noise = Callable[["Row"], Tensor]
"""A source of standard normal noise in float32, called only for rows with a `noise` weight."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Limits the predicted x0 to ±`limit`, the only non-linear part of a step.

    With a `quantile`, the limit is dynamic (Imagen, 2205.11487, section 2.3): s is that quantile of |x0| per image,
    clamped to 1…`limit`; x0 is clipped to ±s and divided by s. `weight` is the factor by which the change carries over
    to the converted output (1 if that output *is* x0).
    """

    limit: float
    quantile: float | None = None
    weight: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        """Clip x0: (B, ...) -> (B, ...), same dtype."""
        if self.quantile is None:
            return x0.clamp(-self.limit, self.limit)
        s = torch.quantile(x0.flatten(1).abs(), self.quantile, dim=1).clamp(min=1, max=self.limit)
        s = s.view(-1, *(1,) * (x0.dim() - 1))
        return x0.clamp(-s, s) / s


@dataclass(frozen=True, slots=True)
class LearnedVariance:
    """Noise whose variance the model predicts in a second half of its channels (2102.09672, equation 15).

    `log_range` holds the logarithms of the smallest and largest variance, between which the prediction (-1 to 1)
    interpolates; if None, the prediction is the variance itself.
    """

    log_range: tuple[float, float] | None = None

    def scale(self, predicted: Tensor) -> Tensor:
        """Return the standard deviation, in the shape of the prediction."""
        if self.log_range is None:
            return predicted.sqrt()
        low, high = self.log_range
        return torch.exp(predicted * ((high - low) / 4) + (high + low) / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model call and the linear combination that follows it::

        out = unet(c_in x, t)        d = a x + b out        x0 = a0 x + b0 out
        x'  = wx x + wo out + ws saved + sum_k w_k d_k + noise z        (d_k newest first, d_0 = d)

    With `correct` = (A, c_0, c_1, …), x is first replaced by A saved + sum_k c_k d_k (UniPC's corrector).
    """

    t: float
    c_in: float = 1.0
    convert: tuple[float, float] = (0.0, 1.0)
    original: tuple[float, float]
    x: float = 1.0
    out: float = 0.0
    saved: float = 0.0
    past: tuple[float, ...] = ()
    noise: float | None = None  # a number, even 0.0, generates noise, to keep the generator in sync
    save: bool = False  # save this row's (corrected) x
    keep: tuple[int, int] = (0, 0)  # slice of (d, *past) to keep: start, stop
    span: tuple[float, float] | None = None  # sigmas (high, low) of a Brownian increment
    clip: Clip | None = None
    learned: LearnedVariance | None = None
    correct: tuple[float, ...] = ()
    predictor: Row | None = None  # another scheduler's row that takes the step from the corrected x


def folded(row: Row) -> Row:
    """Return the same step computed directly from x and the output, if nothing else needs d.

    There is less cancellation, and fewer operations.
    """
    if len(row.past) != 1 or row.keep[1] or row.clip is not None or row.correct:
        return row
    (w,), (a, b) = row.past, row.convert
    return replace(row, x=row.x + w * a, out=row.out + w * b, past=())


@dataclass(frozen=True, slots=True)
class State:
    """What one step passes to the next: the latents, the saved latents, and past converted outputs, newest first."""

    x: Tensor
    saved: Tensor | None = None
    past: tuple[Tensor, ...] = ()
    predictor: State | None = None

    def with_x(self, x: Tensor) -> State:
        """Return the same state with other latents (after inpainting or a callback)."""
        return replace(self, x=x)


def advance(row: Row, state: State, model_output: Tensor, noise: Noise | None = None) -> State:
    """Take one step: (B, C, H, W) latents and model output in, the next state out.

    Sums are accumulated in float32 (float64 if the latents are float64) and cast once, to the latents' dtype. `noise`
    is called for z after the model call, and only if the row has a noise weight. Raises `UsageError` if the row adds
    noise and there is no source.
    """
    dtype = torch.float64 if state.x.dtype == torch.float64 else torch.float32
    x = state.x
    out, predicted = _split_output(x, model_output)
    history = state.past
    if row.past or row.correct or row.keep[1]:
        history = (_convert(row, x, out, dtype), *history)
    if row.correct:
        x = _sum([(row.correct[0], state.saved), *zip(row.correct[1:], history, strict=False)], dtype)
    saved = x if row.save else state.saved
    past = history[row.keep[0] : row.keep[1]] if row.keep[1] else state.past
    if row.predictor is not None:
        start = x.to(state.x.dtype)
        inner_state = State(start) if state.predictor is None else state.predictor.with_x(start)
        inner = advance(row.predictor, inner_state, model_output, noise)
        return State(inner.x, saved, past, inner)

    terms = [(row.x, x), (row.out, out), (row.saved, state.saved), *zip(row.past, history, strict=False)]
    if row.noise is not None:
        if noise is None:
            raise UsageError(f"step at timestep {row.t:g}: this scheduler adds noise, so pass a noise source")
        z = noise(row)
        if row.learned is not None:
            if predicted is None:
                raise UsageError("a learned variance needs a model output with twice the latents' channels")
            z = row.learned.scale(predicted.to(dtype)) * z.to(predicted.device)
        terms.append((row.noise, z.to(x.device)))
    return State(_sum(terms, dtype).to(state.x.dtype), saved, past)


def predict_original(row: Row, x: Tensor, model_output: Tensor) -> Tensor:
    """Return the clean latents x0 implied by this model output, clipped as configured; for previews.

    Shapes are as in `advance`; the result has the latents' dtype.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, _ = _split_output(x, model_output)
    x0 = _sum([(row.original[0], x), (row.original[1], out)], dtype)
    return (x0 if row.clip is None else row.clip(x0)).to(x.dtype)


def _split_output(x: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split the model output into prediction and learned variance, if it has twice the latents' channels."""
    if not isinstance(model_output, Tensor):
        raise UsageError(f"model_output must be a tensor, such as unet(…).sample, not {shown(model_output)}")
    channels = x.shape[1]
    if model_output.shape[1] == 2 * channels:
        return model_output[:, :channels], model_output[:, channels:]
    return model_output, None


def _convert(row: Row, x: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    d = _sum([(row.convert[0], x), (row.convert[1], out)], dtype)
    if row.clip is None:
        return d
    if row.convert == row.original:
        return row.clip(d)
    x0 = _sum([(row.original[0], x), (row.original[1], out)], dtype)
    return d + row.clip.weight * (row.clip(x0) - x0)


def _sum(terms: Iterable[tuple[float, Tensor | None]], dtype: torch.dtype) -> Tensor:
    """Return the sum of weight × tensor. Zero weights are skipped; a first weight of 1 is not multiplied."""
    total: Tensor | None = None
    for weight, tensor in terms:
        if weight == 0.0:
            continue
        if tensor is None:
            raise UsageError(
                "this step continues an earlier one: start at a whole step, with `set_begin_index` or `table`"
            )
        if total is not None:
            total = torch.add(total, tensor, alpha=weight)
        else:
            total = tensor.to(dtype) if weight == 1.0 else tensor.to(dtype) * weight
    if total is None:
        raise UsageError("this step leaves nothing of the latents: every weight of its row is 0")
    return total
