"""The outputs of control networks: ControlNet residuals and T2I-Adapter features, which are added in the U-Net."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.controlnet import ControlNetModel, layer_scales
from sfumato.models.controlnet_union import ControlNetUnionModel
from sfumato.pipelines.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["Added", "Featured", "Read", "Steered", "United", "steered_by", "together", "united"]

# Residuals by the U-Net's argument that adds them.
Added = dict[str, list["Tensor"]]
SKIPS, MIDDLE, WITHIN = (
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Read:
    """The inputs of one micro-batch.

    context: the prompts' embeddings; with_time: inputs of the time embedding; prompts: number of the prompt's branches;
    moments: the time embeddings made from them.
    """

    context: Context
    with_time: dict[str, Tensor]
    prompts: int = 1
    moments: Moments = field(default_factory=Moments)

    @property
    def added(self) -> dict[str, Tensor] | None:
        """Pooled prompts and sizes, which control networks read too; None if there are none."""
        return {name: self.with_time[name] for name in ("text_embeds", "time_ids") if name in self.with_time} or None

    def reads(self, states: Tensor, with_time: dict[str, Tensor]) -> bool:
        """Return whether these inputs are the same."""
        same = (torch.equal(self.with_time[name], value) for name, value in with_time.items())
        return torch.equal(self.context.states, states) and all(same)

    def of_prompt(self, count: int) -> Read:
        """Return the inputs of only the prompt's branches. count: number of images."""
        count *= self.prompts
        if self.context.states.shape[0] == count:
            return self
        if count not in self._alone:
            with_time = {name: one[-count:] for name, one in self.with_time.items()}
            context = Context(self.context.states[-count:], keep=self.context.keep)
            self._alone[count] = Read(context, with_time, self.prompts)
        return self._alone[count]

    @cached_property
    def _alone(self) -> dict[int, Read]:
        return {}


@dataclass(frozen=True, eq=False)
class Steered:
    """A control network with its control images.

    pictures: (1 or B, C, H, W), usually in [0, 1]; scale: its strength; start, end: the fractions of the steps between
    which it is active; layers: a factor for each residual (empty: 1 for each); guess: guess mode, which affects only
    the prompt's branch, and shallow layers less.
    """

    network: Any
    pictures: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: tuple[float, ...] = ()
    guess: bool = False

    def active(self, step: int, steps: int) -> bool:
        """Return whether the network is active in a step, counted from 0. Inactive networks are not computed."""
        outside = step / steps < self.start or (step + 1) / steps > self.end
        return not outside and self.scale != 0

    def of(self, count: int, latents: Tensor) -> Self:
        """Return a copy for `count` images with these latents, possibly several per prompt.

        Raises `UsageError` if the control images have the wrong number or size.
        """
        config, there = self.network.config, self.pictures.shape[0]
        wanted = (self.channels, *(config.factor * side for side in latents.shape[2:]))
        if count % there:
            raise UsageError(f"got {there} control images for {count} images; pass one, or one per prompt")
        if tuple(self.pictures.shape[1:]) != wanted:
            shape = tuple(self.pictures.shape[1:])
            raise UsageError(f"the control image must be {wanted} (channels, height, width), not {shape}")
        pictures = self.pictures if there == 1 else self.pictures.repeat_interleave(count // there, dim=0)
        return replace(self, pictures=pictures)

    def part(self, begin: int, size: int) -> Self:
        """Return a copy for some of the images."""
        return self if self.pictures.shape[0] == 1 else replace(self, pictures=self.pictures[begin : begin + size])

    def within(self, row: slice, column: slice) -> Self:
        """Return a copy for a tile of the latents."""
        factor = self.network.config.factor
        rows, columns = (slice(factor * one.start, factor * one.stop) for one in (row, column))
        return replace(self, pictures=self.pictures[:, :, rows, columns])

    @property
    def channels(self) -> int:
        """The number of channels of the control image."""
        return self.network.config.conditioning_channels

    @cached_property
    def hint(self) -> Any:
        """The embedding of the control images, which is the same for all steps."""
        pictures = self.pictures.to(self.network.device, self.network.dtype)
        return self._embedded(pictures.contiguous())  # the weights decide the layout, as the plan says

    def _embedded(self, pictures: Tensor) -> Any:
        return self.network.embed(pictures)

    def _with_time(self, read: Read) -> dict[str, Tensor] | None:
        return read.added

    @property
    def count(self) -> int:
        """The number of residuals."""
        return len(self.network.controlnet_down_blocks) + 1

    def added(self, x: Tensor, t: float, read: Read) -> Added:
        """Compute residuals for scaled latents x (B, C, h, w) at timestep t: for skip connections, and the middle."""
        network: ControlNetModel = self.network
        x, hint, whole = x.to(network.dtype), self.hint.to(network.dtype), read.context
        if self.guess:
            read = read.of_prompt(x.shape[0])
        context = read.context
        if context.states.dtype != network.dtype:
            context = Context(context.states.to(network.dtype), keep=False)
        added = network.steer(x, network.moment(x, t, added_cond_kwargs=self._with_time(read)), context, hint)
        guess = self.guess and not network.config.global_pool_conditions
        factors = layer_scales(len(added), guess=guess)
        factors = [factor * own for factor, own in zip(factors, self.layers or [1.0] * len(added), strict=True)]
        added = [one * (self.scale * factor) for one, factor in zip(added, factors, strict=True)]
        if self.guess:
            added = [_of_prompts(one, x.shape[0] * read.prompts, whole) for one in added]
        return {SKIPS: added[:-1], MIDDLE: added[-1:]}


@dataclass(frozen=True, eq=False)
class United(Steered):
    """A ControlNet Union, which reads several control images at once, concatenated along their channels.

    modes: the kind of each image; shares: the strength of each, if there are several.
    """

    modes: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (1.0,)

    @property
    def channels(self) -> int:
        """The number of channels of all control images together."""
        return len(self.modes) * self.network.config.conditioning_channels

    @property
    def time_and_network(self) -> tuple[object, ...]:
        """The settings that must be equal to combine two of them."""
        return id(self.network), self.start, self.end, self.layers, self.guess

    def _embedded(self, pictures: Tensor) -> Tensor:
        return self.network.embed_all(pictures.chunk(len(self.modes), dim=1), self.modes, self.shares)

    def _with_time(self, read: Read) -> dict[str, Tensor] | None:
        return (read.added or {}) | {"control_type": self.network.types(self.modes)}


@dataclass(frozen=True, eq=False)
class Featured(Steered):
    """A T2I-Adapter, whose features depend only on the control image and are computed once."""

    @property
    def count(self) -> int:
        """The number of features."""
        return len(self.network.config.blocks)

    def added(self, x: Tensor, t: float, read: Read) -> Added:
        """Return the features to add to the U-Net's down blocks, which are the same for all steps."""
        factors = self.layers or [1.0] * self.count
        features = [one * (self.scale * factor) for one, factor in zip(self.hint, factors, strict=True)]
        if self.guess:
            features = [_of_prompts(one, x.shape[0] * read.prompts, read.context) for one in features]
        return {WITHIN: features}


def _of_prompts(added: Tensor, count: int, context: Context) -> Tensor:
    """Extend residuals to all branches: the last `count` rows are the prompt's, and all others are zero."""
    others = context.states.shape[0] - count
    if not others:
        return added
    wide = added.repeat(count // added.shape[0], 1, 1, 1)
    return torch.cat([wide.new_zeros(others, *wide.shape[1:]), wide])


def steered_by(network: Any, pictures: Tensor, **how: Any) -> Steered:
    """Combine a control network and its images. how: the other fields of a `Steered`."""
    kinds = {ControlNetUnionModel: United, ControlNetModel: Steered}
    kind = next((one for cls, one in kinds.items() if isinstance(network, cls)), Featured)
    if network.config.conditioning_channels == 1:
        pictures = pictures.mean(dim=1, keepdim=True)
    return kind(network, pictures, **how)


def united(every: Sequence[Steered]) -> tuple[Steered, ...]:
    """Combine control images for the same ControlNet Union in the same steps, so that one call reads all of them."""
    found: list[Steered] = []
    for one in every:
        last = found[-1] if found else None
        if isinstance(one, United) and isinstance(last, United) and last.time_and_network == one.time_and_network:
            shares = (last.scale,) if len(last.modes) == 1 else last.shares
            count = max(last.pictures.shape[0], one.pictures.shape[0])
            pictures = torch.cat([each.pictures.expand(count, -1, -1, -1) for each in (last, one)], dim=1)
            modes = (*last.modes, *one.modes)
            found[-1] = replace(last, pictures=pictures, modes=modes, shares=(*shares, one.scale), scale=1.0)
        else:
            found.append(one)
    return tuple(found)


def together(every: Iterable[Added], context: Context) -> dict[str, Any]:
    """Sum the residuals of several networks, by the U-Net's argument names."""
    total: Added = {}
    for added in every:
        for where, own in added.items():
            sums = zip(total.get(where, ()), own, strict=True) if where in total else ()
            total[where] = [_sum(one, other, context) for one, other in sums] or own
    return {where: own[0] if where == MIDDLE else own for where, own in total.items()}


def _sum(one: Tensor, other: Tensor, context: Context) -> Tensor:
    if one.shape[0] != other.shape[0]:
        one, other = context.widen(one), context.widen(other)
    return one + other
