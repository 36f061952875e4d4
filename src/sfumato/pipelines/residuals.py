"""What control networks add to the U-Net: ControlNet residuals, and T2I-Adapter features in the encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.controlnet import ControlNetModel, layer_scales
from sfumato.models.controlnet_union import ControlNetUnionModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["Added", "Featured", "Read", "Steered", "United", "steered_by", "together", "united"]

# Residuals by where the U-Net adds them, in the words of its arguments.
Added = dict[str, list["Tensor"]]
SKIPS, MIDDLE, WITHIN = (
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Read:
    """What one micro-batch reads: the prompts, and what goes with time; prompts: how many branches are the prompt's."""

    context: Context
    with_time: dict[str, Tensor]
    prompts: int = 1

    @property
    def added(self) -> dict[str, Tensor] | None:
        """Pooled prompts and sizes, which networks beside the U-Net read as well; None where there are none."""
        return {name: self.with_time[name] for name in ("text_embeds", "time_ids") if name in self.with_time} or None

    def reads(self, states: Tensor, with_time: dict[str, Tensor]) -> bool:
        """Whether that is the same."""
        same = (torch.equal(self.with_time[name], value) for name, value in with_time.items())
        return torch.equal(self.context.states, states) and all(same)

    def of_prompt(self, count: int) -> Read:
        """The same of the prompts alone, without what they are guided away from; count: how many images there are."""
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
    """A network beside the U-Net, what it sees, and how strongly and when it steers.

    pictures (1 or B, C, H, W), in [0, 1] as a rule; start and end: shares of the steps; layers: a factor for each
    residual, empty for 1 each; guess: the prompt's half of guidance alone, the shallow layers less.
    """

    network: Any
    pictures: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: tuple[float, ...] = ()
    guess: bool = False

    def active(self, step: int, steps: int) -> bool:
        """Whether it steers in a step, counted from 0; where it does not, it is not computed."""
        outside = step / steps < self.start or (step + 1) / steps > self.end
        return not outside and self.scale != 0

    def of(self, count: int, latents: Tensor) -> Self:
        """The same for `count` images with these latents, several of which may be of one prompt.

        Raises `UsageError` for pictures of another number or size.
        """
        config, there = self.network.config, self.pictures.shape[0]
        wanted = (self.channels, *(config.factor * side for side in latents.shape[2:]))
        if count % there:
            raise UsageError(f"got {there} control images for {count} images; pass one, or one per prompt")
        if tuple(self.pictures.shape[1:]) != wanted:
            shape = tuple(self.pictures.shape[1:])
            raise UsageError(f"the control image is {shape} (channels, height, width), and it must be {wanted}")
        pictures = self.pictures if there == 1 else self.pictures.repeat_interleave(count // there, dim=0)
        return replace(self, pictures=pictures)

    def part(self, begin: int, size: int) -> Self:
        """The same for some of the images."""
        return self if self.pictures.shape[0] == 1 else replace(self, pictures=self.pictures[begin : begin + size])

    def within(self, row: slice, column: slice) -> Self:
        """The same of a tile of the latents."""
        factor = self.network.config.factor
        rows, columns = (slice(factor * one.start, factor * one.stop) for one in (row, column))
        return replace(self, pictures=self.pictures[:, :, rows, columns])

    @property
    def channels(self) -> int:
        """Channels of what the network sees."""
        return self.network.config.conditioning_channels

    @cached_property
    def hint(self) -> Any:
        """What the network makes of the pictures, whatever the step."""
        pictures = self.pictures.to(self.network.device, self.network.dtype)
        return self._embedded(pictures.contiguous())  # the weights decide the layout, as the plan says

    def _embedded(self, pictures: Tensor) -> Any:
        return self.network.embed(pictures)

    def _with_time(self, read: Read) -> dict[str, Tensor] | None:
        return read.added

    @property
    def count(self) -> int:
        """How many residuals there are."""
        return len(self.network.controlnet_down_blocks) + 1

    def added(self, x: Tensor, t: float, read: Read) -> Added:
        """What is added for scaled latents x (B, C, h, w) at timestep t: to each skip connection, and to the middle."""
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
    """The same of a ControlNet Union, which sees several pictures at once, side by side along their channels.

    modes: the kind of each picture; shares: how strongly each is seen, where there are several.
    """

    modes: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (1.0,)

    @property
    def channels(self) -> int:
        """Channels of all pictures."""
        return len(self.modes) * self.network.config.conditioning_channels

    @property
    def time_and_network(self) -> tuple[object, ...]:
        """What has to be the same for two of them to be seen together."""
        return id(self.network), self.start, self.end, self.layers, self.guess

    def _embedded(self, pictures: Tensor) -> Tensor:
        return self.network.embed_all(pictures.chunk(len(self.modes), dim=1), self.modes, self.shares)

    def _with_time(self, read: Read) -> dict[str, Tensor] | None:
        return (read.added or {}) | {"control_type": self.network.types(self.modes)}


@dataclass(frozen=True, eq=False)
class Featured(Steered):
    """The same of a T2I-Adapter, whose features are those of the picture alone, made once."""

    @property
    def count(self) -> int:
        """How many features there are."""
        return len(self.network.config.blocks)

    def added(self, x: Tensor, t: float, read: Read) -> Added:
        """What is added to each block of the way down, whatever the step."""
        factors = self.layers or [1.0] * self.count
        features = [one * (self.scale * factor) for one, factor in zip(self.hint, factors, strict=True)]
        if self.guess:
            features = [_of_prompts(one, x.shape[0] * read.prompts, read.context) for one in features]
        return {WITHIN: features}


def _of_prompts(added: Tensor, count: int, context: Context) -> Tensor:
    """What is added for all branches, of which the last `count` rows are the prompt's, and the others get nothing."""
    others = context.states.shape[0] - count
    if not others:
        return added
    wide = added.repeat(count // added.shape[0], 1, 1, 1)
    return torch.cat([wide.new_zeros(others, *wide.shape[1:]), wide])


def steered_by(network: Any, pictures: Tensor, **how: Any) -> Steered:
    """How a network steers by pictures; the fields of a `Steered`."""
    kinds = {ControlNetUnionModel: United, ControlNetModel: Steered}
    kind = next((one for cls, one in kinds.items() if isinstance(network, cls)), Featured)
    if network.config.conditioning_channels == 1:
        pictures = pictures.mean(dim=1, keepdim=True)
    return kind(network, pictures, **how)


def united(every: Sequence[Steered]) -> tuple[Steered, ...]:
    """The same, with all pictures that one ControlNet Union sees in the same steps seen together, in one call."""
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
    """The residuals of several networks, added up, as the U-Net takes them by name."""
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
