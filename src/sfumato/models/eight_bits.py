"""Weights in 8 bits: integers, and one scale for each output channel; what a layer computes with stays as wide as ever.

A scale has so few bits that it is exact in bfloat16, and an integer times its scale is exact in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["EightBit", "EightBitConv2d", "EightBitLinear", "Stored", "eight_bit_layers", "lighten", "signs", "stored"]

# The largest integer of a weight.
MOST = 127
# Values that are rounded at a time.
BLOCK = 2**19
# Values of each tensor whose signs identify it: enough to tell two trainings apart, and read in milliseconds.
SAMPLES = 64
# The blocks of a U-Net, without time embeddings, norms, and the first and last layers, which are small and delicate.
_LARGE = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?!.*(time_emb_proj|norm))")


def signs(weight: Tensor) -> Tensor:
    """Return whether sampled values of a weight are negative."""
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].signbit().cpu()


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight (C', …) in 8 bits: integers, and scales (C',) in the dtype of computations. signs: of its values."""

    values: Tensor
    scales: Tensor
    signs: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.values.shape

    def is_floating_point(self) -> bool:
        """Whether it stands for floating-point numbers, as loading asks of every weight: it does."""
        return True

    def widened(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in a dtype, by default that of computations."""
        scales = self.scales.to(dtype or self.scales.dtype)
        if self.values.is_meta:  # multiplying there would import half a compiler
            return torch.empty(self.shape, dtype=scales.dtype, device="meta")
        return self.values.to(scales.dtype) * scales.view(-1, *[1] * (self.values.ndim - 1))


def stored(weight: Tensor, dtype: torch.dtype | None = None) -> Stored:
    """Round a weight (C', …) to 8 bits: no value is off by more than half its channel's scale.

    dtype: of the scales, and so of computations; by default, that of the weight.
    """
    flat = weight.detach().flatten(1)
    values = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
    scales = torch.empty(len(flat), device=flat.device)
    rows = max(1, BLOCK // flat.shape[1])
    for begin in range(0, len(flat), rows):
        here = slice(begin, begin + rows)
        wide = flat[here].float()
        scale = _short(wide.abs().amax(1) / MOST)
        scales[here] = torch.where(scale == 0, 1.0, scale)
        values[here] = (wide / scales[here, None]).round_()
    return Stored(values.view(weight.shape), scales.to(dtype or weight.dtype), signs(weight))


def _short(scale: Tensor) -> Tensor:
    """Round positive float32 numbers up to eight significant bits."""
    return scale.view(torch.int32).add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


class EightBit(nn.Module):
    """A layer whose weight is stored in 8 bits, and widened for each call. `state_dict` is that of the plain layer."""

    values: Tensor
    scales: Tensor
    signs: Tensor
    bias: Tensor | None

    @property
    def stored(self) -> Stored:
        """The weight as it is stored."""
        return Stored(self.values, self.scales, self.signs)

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype of computations."""
        return self.stored.widened()

    def store(self, weight: Stored) -> None:
        """Replace the weight."""
        self.values, self.scales, self.signs = weight.values, weight.scales, weight.signs

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        *more: Any,
        **named: Any,
    ) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        else:
            self.store(weight if isinstance(weight, Stored) else stored(weight, self.scales.dtype))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *more, **named)


class EightBitLinear(EightBit, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`nn.Linear` with a weight in 8 bits."""


class EightBitConv2d(EightBit, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`nn.Conv2d` with a weight in 8 bits."""


_KINDS: dict[type[nn.Module], type[EightBit]] = {nn.Linear: EightBitLinear, nn.Conv2d: EightBitConv2d}


def lighten(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Callable[[Tensor], Stored]]:
    """Make the large layers of a model that is still without weights store 8 bits.

    dtype: of computations; None for that in which weights are stored. Returns, by the name of each of their weights,
    the function that makes it smaller: to be applied while loading, so that all of them are never in memory in full.
    """
    made: dict[str, Callable[[Tensor], Stored]] = {}
    for path, layer in model.named_modules():
        kind = _KINDS.get(type(layer))
        if kind is None or not _LARGE.match(path) or getattr(layer, "groups", 1) > 1:
            continue
        weight = layer._parameters.pop("weight")
        assert weight is not None
        layer.__class__ = kind
        layer.register_buffer("values", torch.empty(weight.shape, dtype=torch.int8, device="meta"), persistent=False)
        layer.register_buffer("scales", torch.empty(len(weight), device="meta"), persistent=False)
        layer.signs = torch.zeros(SAMPLES, dtype=torch.bool)
        made[f"{path}.weight"] = partial(stored, dtype=dtype)
    return made


def eight_bit_layers(model: nn.Module) -> Iterator[tuple[str, EightBit]]:
    """Yield the layers whose weights are stored in 8 bits, with their paths."""
    yield from ((path, layer) for path, layer in model.named_modules() if isinstance(layer, EightBit))
