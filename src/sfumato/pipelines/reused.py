"""What a request with `fast` reuses from step to step, and which methods keep its promise."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import torch

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.errors import UsageError
from sfumato.models.blocks import Deep
from sfumato.models.unet import UNet2DConditionModel
from sfumato.request import Fast, GenerateRequest, Reuse

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.models.attention import Context
    from sfumato.models.blocks import Moment
    from sfumato.models.unet import UpBlock
    from sfumato.pipelines.parts import Parts
    from sfumato.schedulers.base import Scheduler

__all__ = ["Line", "Reused", "hastened", "methods", "shallow"]

# What a request may say besides, as it was measured: everything else that differs from its default is drawn exactly.
FREE = {
    "fast", "prompt", "negative_prompt", "prompt_syntax", "steps", "guidance_scale", "seed", "rng", "noise", "count",
    "width", "height", "scheduler", "lora_dir", "embeddings", "vae_weights",
}  # fmt: skip
# Each step goes on by this share of the change before it. Features change ever more slowly: with every pattern of steps
# tried on the built-in model, 0.7 predicts them better than 1, a straight line, and than 0.4 (docs/log.md).
FLATTENS = 0.7


def shallow(
    unet: UNet2DConditionModel, sample: Tensor, time: Moment, context: Context, layers: int, features: Tensor
) -> Tensor:
    """The prediction (B, C, H, W) of a sample by the last `layers` of the way up, from features that `Deep` has kept.

    With those of the same sample and moment it is the prediction of the whole U-Net, to the last bit. Knows neither
    FreeU nor networks beside the U-Net.
    """
    x = unet.entered(sample, time, context)
    skips = [x]
    for block in unet.down_blocks:
        if len(skips) >= layers:
            break
        x, results = block(x, time, context)
        skips += results
    skips, x = skips[:layers], features
    blocks = cast("list[UpBlock]", list(unet.up_blocks))
    first = sum(len(block.resnets) for block in blocks) - layers
    for block in blocks:
        if first < len(block.resnets):
            x = block(x, time, context, skips, first=first)
        first = max(0, first - len(block.resnets))
    return unet.left(x, context)


@dataclass
class Line:
    """Values of the last two steps that computed them; later ones begin on the line through them, which flattens."""

    known: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self, step: int, value: Tensor) -> None:
        """Keep what a step has computed, also where it is repeated."""
        self.known = [*[one for one in self.known if one[0] < step][-1:], (step, value)]

    def at(self, step: int) -> Tensor | None:
        """The value (B, …) at a later step, None if there is none yet."""
        if len(self.known) < 2:
            return self.known[0][1] if self.known else None
        (before, first), (last, second) = self.known
        ahead = sum(FLATTENS**i for i in range(1, step - last + 1))
        return torch.lerp(first, second, 1 + ahead / (last - before))


@dataclass
class Reused:
    """What one micro-batch keeps between steps: deep features, and the direction of guidance."""

    fast: Fast
    deep: Line = field(default_factory=Line)
    direction: Tensor | None = None  # of the last step that computed it: a line through two would double their errors

    def guides(self, step: int, total: int) -> bool:
        """Whether this step computes the direction of guidance."""
        return (self.fast.guidance or Reuse()).computes(step, total) or self.direction is None

    def output(
        self, unet: UNet2DConditionModel, x: Tensor, moment: Moment, context: Context, step: int, total: int
    ) -> Tensor:
        """The U-Net's output for latents x (B, C, h, w), whole or by its last layers from features of earlier steps."""
        if self.fast.deep is None:
            return unet(x, moment, context, return_dict=False)[0]
        known, rows = self.deep.at(step), context.states.shape[0]
        if known is not None and not self.fast.deep.computes(step, total):
            return shallow(unet, x, moment, context, self.fast.layers, known[-rows:].to(x.dtype))
        deep = Deep(self.fast.layers)
        output = unet(x, moment, context, deep=deep, return_dict=False)[0]
        if deep.features is not None:
            # A step without the direction of guidance computes the prompt's features alone, which are the last rows.
            others = () if known is None or len(known) == rows else (known[:-rows].to(x.dtype),)
            self.deep.keep(step, torch.cat([*others, deep.features]) if others else deep.features)
        return output


def hastened(request: GenerateRequest, parts: Parts, scheduler: Scheduler) -> tuple[GenerateRequest, list[str]]:
    """Return the request with the methods that keep its promise, or without one and a note why it is drawn exactly."""
    if request.fast is None:
        return request, []
    try:
        return request.replace(fast=methods(request, parts, scheduler)), []
    except UsageError as error:
        return request.replace(fast=None), [f"drawn exactly: {error}"]


def methods(request: GenerateRequest, parts: Parts, scheduler: Scheduler) -> Fast:
    """How to keep the promise of a request: as it says, or by the row of the table that asks for the least work.

    Raises `UsageError`, with the reason, where no row was measured for what it asks for.
    """
    fast = request.fast or Fast(promise=100)
    what = f"{fast.promise:g} dB cannot be promised"
    more = [
        name.replace("_", " ")
        for name, one in GenerateRequest.__dataclass_fields__.items()
        if name not in FREE and getattr(request, name) != one.default
    ]
    if request.joined:
        more.append("AND")
    unknown = not isinstance(parts.unet, UNet2DConditionModel) or parts.unet.config.is_k
    if more or unknown:
        raise UsageError(f"{what} with {' and '.join(more) if more else 'this kind of model'}; it was not measured")
    if fast.deep is not None or fast.guidance is not None:
        return fast
    kind = parts.name if parts.name == BUILT_IN else parts.family.name
    rows = [row for row in _table() if row["kind"] == kind]
    if not rows:
        raise UsageError(f"{what} with {parts.name}, which was not measured")
    steps, scale, name = request.chosen_steps, request.chosen_scale, type(scheduler).__name__
    rows = [row for row in rows if _within(steps, row["steps"]) and _within(scale, row["guidance_scale"])]
    own = parts.size_of(request.replace(width=None, height=None))
    rows = [row for row in rows if row["scheduler"] == name and parts.size_of(request) == own]
    if not rows:
        raise UsageError(
            f"{what} for this size, scheduler, number of steps and guidance scale, which were not measured"
        )
    kept = [row for row in rows if row["promise"] >= fast.promise]
    if not kept:
        raise UsageError(f"{what}: at most {max(row['promise'] for row in rows):g} dB can")
    row = min(kept, key=lambda row: row["promise"])
    return Fast.from_dict({"promise": fast.promise, **row["methods"]})


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _table() -> list[dict[str, Any]]:
    return tomllib.loads(files("sfumato.pipelines").joinpath("fast.toml").read_text(encoding="utf-8"))["row"]
