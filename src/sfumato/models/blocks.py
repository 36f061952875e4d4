"""Layers shared by the U-Net and the autoencoder. Attribute names are the parameter names of diffusers.

Layers are created and registered in the same order as in diffusers, so that a seed gives the same initial weights, and
optimizer states, which go by position, match.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels.gpu import GpuKernels, gpu_kernels
from sfumato.models.recomputed import Recomputed

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Downsample2D",
    "GroupNorm",
    "Moment",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "Upsample2D",
    "activation",
    "sinusoidal_embedding",
]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def activation(name: str) -> nn.Module:
    """Return the activation module for a name, which the config has validated."""
    return _ACTIVATIONS[name]()


def sinusoidal_embedding(timesteps: Tensor, size: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Embed timesteps (B,) as sines and cosines (B, size) in float32.

    Frequencies fall geometrically from 1 to 1/10000 ("Denoising Diffusion Probabilistic Models", arXiv 2006.11239,
    appendix B).
    """
    half = size // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))
    parts = (torch.cos(angles), torch.sin(angles)) if flip_sin_to_cos else (torch.sin(angles), torch.cos(angles))
    return F.pad(torch.cat(parts, dim=-1), (0, size % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers that map a sinusoidal embedding (B, C) to the time embedding of the residual blocks (B, T)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        act_fn: str,
        condition_channels: int | None = None,
        post_act_fn: str | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, out_channels)
        self.cond_proj = nn.Linear(condition_channels, channels, bias=False) if condition_channels else None
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(out_channels, out_channels)
        self.post_act = nn.Identity() if post_act_fn is None else activation(post_act_fn)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C) and, in guidance-distilled models, a condition (B, C') -> (B, T)."""
        if condition is not None and self.cond_proj is not None:
            x = x + self.cond_proj(condition)
        return self.post_act(self.linear_2(self.act(self.linear_1(x))))


class Moment:
    """The activated time embedding (B, T), or (1, T) if the batch shares a timestep, and its projections.

    Each layer's projection is computed once and cached, so that micro-batches with the same timestep share it. With
    `keep=False` nothing is cached. A part of a whole reads its rows from the whole's projections.
    """

    def __init__(self, activated: Tensor, *, keep: bool = True, whole: Moment | None = None, first: int = 0) -> None:
        self.activated, self.keep = activated, keep
        self._whole, self._rows = whole, slice(first, first + activated.shape[0])
        self._projections: dict[nn.Module, Tensor] = {}

    def through(self, layer: nn.Module) -> Tensor:
        """Project the embedding with a linear layer: (B or 1, C)."""
        if not self.keep:
            return layer(self.activated)
        if layer not in self._projections:
            whole = self._whole
            self._projections[layer] = layer(self.activated) if whole is None else whole.through(layer)[self._rows]
        return self._projections[layer]

    def parts(self, count: int) -> list[Moment]:
        """Return the moments of `count` steps, whose rows follow each other here."""
        rows, whole = self.activated.shape[0] // count, self if count > 1 else None
        every = self.activated.split(rows)
        return [Moment(one, keep=self.keep, whole=whole, first=i * rows) for i, one in enumerate(every)]

    def copied(self, layers: Iterable[nn.Module] = ()) -> Moment:
        """Return a moment with its own memory, which `load` overwrites; layers: whose projections to copy too."""
        one = Moment(self.activated.clone(), keep=self.keep)
        one._projections = {layer: self.through(layer).clone() for layer in layers}
        return one

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers that have projected the embedding so far."""
        return tuple(self._projections if self._whole is None else self._whole._projections)

    def load(self, other: Moment) -> None:
        """Take the values of another moment, in place."""
        mine = [self.activated, *self._projections.values()]
        theirs = [other.activated, *(other.through(layer) for layer in self._projections)]
        torch._foreach_copy_(mine, theirs)  # pyright: ignore[reportPrivateImportUsage]


class GroupNorm(nn.GroupNorm):
    """Group normalization fused with the addition before it and the activation after it."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, act: nn.Module | None = None, added: Tensor | None = None
    ) -> Tensor:
        """Normalize x + added, then apply the activation, if any: x (B, C, H, W), added (B or 1, C) or None."""
        kernels = gpu_kernels(x)
        if kernels is not None and kernels.takes(x) and (act is None or type(act) is nn.SiLU):
            silu = act is not None
            return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, added, silu=silu)
        x = super().forward(x if added is None else x + added[:, :, None, None])
        return x if act is None else act(x)


class ResnetBlock2D(Recomputed):
    """Two normalized convolutions with a shortcut, conditioned on the time embedding, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None,
        groups: int,
        eps: float,
        act_fn: str,
        scale_shift: bool = False,
        output_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = activation(act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Moment | None = None) -> Tensor:
        """Map x (B, C, H, W) and the time embedding to (B, C', H, W)."""
        kernels = gpu_kernels(x, self.conv1, self.conv2, self.conv_shortcut)
        steered = None if time is None else time.through(self.time_emb_proj)
        if kernels is not None and steered is not None and not self.scale_shift and self.output_scale == 1.0:
            return self._fused(kernels, x, steered)
        h = self.conv1(self.norm1(x, self.act))
        if steered is not None and self.scale_shift:
            scale, shift = steered[:, :, None, None].chunk(2, dim=1)
            h = self.act(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h, self.act, steered)
        h = self.conv2(self.dropout(h))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + h if self.output_scale == 1.0 else (x + h) / self.output_scale

    def _fused(self, kernels: GpuKernels, x: Tensor, steered: Tensor) -> Tensor:
        """The same, with the biases of the convolutions in the sums that follow them: torch would add them alone."""
        h, bias = _unbiased(self.conv1, self.norm1(x, self.act))
        h, bias = _unbiased(self.conv2, self.dropout(self.norm2(h, self.act, steered + bias)))
        if self.conv_shortcut is not None:
            x, more = _unbiased(self.conv_shortcut, x)
            bias = bias + more
        if kernels.takes(x) and kernels.takes(h):
            return kernels.biased_sum(x, h, bias)
        return x + (h + bias[:, None, None])


def _unbiased(conv: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution without its bias, and the bias (C,)."""
    return conv._conv_forward(x, conv.weight, None), conv.bias


class Downsample2D(nn.Module):
    """Halves height and width with a strided convolution. Padding 0 pads only on the right and at the bottom."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2), rounded up."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class Upsample2D(nn.Module):
    """Doubles height and width by nearest-neighbor interpolation, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or `size`, for skip connections of odd size."""
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))
