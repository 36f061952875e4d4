"""The blocks of k-diffusion's U-Net (arXiv 2206.00364), used by the latent upscaler.

The time embedding modulates every normalization, attention has no feed-forward, resizing uses a fixed filter, and each
level but the deepest has a single skip connection, from its last layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.configs import K_GROUP, UNet2DConditionConfig
from sfumato.models.attention import Context, SelfOrCrossAttention
from sfumato.models.blocks import Moment, activation

__all__ = [
    "AdaGroupNorm",
    "FourierProjection",
    "KAttention",
    "KDownBlock",
    "KLevel",
    "KResnet",
    "KUpBlock",
    "NormedCrossAttention",
]


class FourierProjection(nn.Module):
    """Embeds noise levels (B,) as cosines and sines (B, 2 C) of fixed random frequencies (arXiv 2006.10739, eq. 4)."""

    def __init__(self, channels: int, *, flip_sin_to_cos: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels), requires_grad=False)
        self.flip_sin_to_cos = flip_sin_to_cos

    def forward(self, levels: Tensor) -> Tensor:
        """(B,) -> (B, 2 C) in float32."""
        angles = levels[:, None].float() * self.weight.float() * 2 * math.pi
        parts = (torch.cos(angles), torch.sin(angles))
        return torch.cat(parts if self.flip_sin_to_cos else parts[::-1], dim=-1)


class AdaGroupNorm(nn.Module):
    """Group normalization with scale and shift from the time embedding."""

    def __init__(self, time_channels: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = channels // K_GROUP, eps
        self.linear = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Tensor, time: Moment) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        scale, shift = time.through(self.linear)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups, eps=self.eps) * (1 + scale) + shift


class KResnet(nn.Module):
    """Two normalized convolutions with a shortcut, and `between` channels in the middle."""

    def __init__(self, level: KLevel, in_channels: int, between: int, out_channels: int) -> None:
        super().__init__()
        config = level.config
        self.norm1 = AdaGroupNorm(level.time_channels, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, between, 3, padding=1)
        self.norm2 = AdaGroupNorm(level.time_channels, between, config.norm_eps)
        self.conv2 = nn.Conv2d(between, out_channels, 3, padding=1)
        self.act = activation(config.act_fn)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, time: Moment) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        h = self.conv1(self.act(self.norm1(x, time)))
        h = self.conv2(self.act(self.norm2(h, time)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class NormedCrossAttention(SelfOrCrossAttention):
    """Cross-attention that normalizes the context first."""

    def __init__(self, channels: int, heads: int, context: int, *, upcast: bool) -> None:
        super().__init__(channels, heads, context=context, bias=True, upcast=upcast)
        self.norm_cross = nn.LayerNorm(context)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project what is attended to: (B, S, C') -> keys and values, each (B, heads, S, d)."""
        return super().keys_and_values(self.norm_cross(states))


class KAttention(nn.Module):
    """Cross-attention from pixels to the prompt, after self-attention if `within`."""

    def __init__(self, level: KLevel, channels: int, *, within: bool) -> None:
        super().__init__()
        config, heads = level.config, max(1, channels // level.config.heads[level.index])
        context = config.per_block("cross_attention_dim")[level.index]
        if within:
            self.norm1 = AdaGroupNorm(level.time_channels, channels)
            self.attn1 = SelfOrCrossAttention(channels, heads, bias=True)
        self.norm2 = AdaGroupNorm(level.time_channels, channels)
        self.attn2 = NormedCrossAttention(channels, heads, context, upcast=config.upcast_attention)
        self.within = within

    @property
    def reading(self) -> tuple[SelfOrCrossAttention, ...]:
        """The layers that attend to the prompt."""
        return (self.attn2,)

    def forward(self, x: Tensor, time: Moment, context: Context) -> Tensor:
        """Map x (B or a divisor of B, C, H, W) and a context of B prompts to (B, C, H, W)."""
        size = x.shape[2:]
        if self.within:
            x = x + self.attn1(_tokens(self.norm1(x, time)), None, context.mask).transpose(1, 2).unflatten(2, size)
        x = context.widen(x)
        found = self.attn2(_tokens(self.norm2(x, time)), context, context.states_mask)
        return x + found.transpose(1, 2).unflatten(2, size)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()  # as in the transformer


@dataclass(frozen=True)
class KLevel:
    """One resolution of the U-Net, and the blocks built for it."""

    config: UNet2DConditionConfig
    index: int
    time_channels: int

    @property
    def deepest(self) -> bool:
        """Whether this is the lowest resolution."""
        return self.index == len(self.config.block_out_channels) - 1

    def down(self) -> KDownBlock:
        """Build the down block from the level above to this one."""
        return KDownBlock(*self._parts("down", self.config.down_block_types[self.index]), last=self.deepest)

    def up(self) -> KUpBlock:
        """Build the up block from this level to the one above, with that level's width."""
        parts = self._parts("up", self.config.up_block_types[-1 - self.index])
        return KUpBlock(*parts, first=self.deepest, last=self.index == 0)

    def _parts(self, way: str, kind: str) -> tuple[nn.ModuleList, nn.ModuleList | None]:
        widths = self.config.k_widths(way, self.index)
        resnets = nn.ModuleList(KResnet(self, *channels) for channels in widths)
        attentions = (KAttention(self, channels[2], within=self.deepest) for channels in widths)
        return resnets, nn.ModuleList(attentions) if "CrossAttn" in kind else None


class _KBlock(nn.Module):
    """Residual blocks, each optionally followed by attention."""

    def __init__(self, resnets: nn.ModuleList, attentions: nn.ModuleList | None) -> None:
        super().__init__()
        self.resnets, self.attentions = resnets, attentions

    def _through(self, x: Tensor, time: Moment, context: Context) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            x = x if self.attentions is None else self.attentions[i](x, time, context)
        return x


class KDownBlock(_KBlock):
    """`KDownBlock2D` or, with attention, `KCrossAttnDownBlock2D`."""

    def __init__(self, resnets: nn.ModuleList, attentions: nn.ModuleList | None, *, last: bool) -> None:
        super().__init__(resnets, attentions)
        self.last = last

    def forward(self, x: Tensor, time: Moment, context: Context) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> the downsampled output, and the skip connection in a list, empty for the last block."""
        x = self._through(x, time, context)
        return (x, []) if self.last else (_halved(x), [x])


class KUpBlock(_KBlock):
    """`KUpBlock2D` or, with attention, `KCrossAttnUpBlock2D`."""

    def __init__(self, resnets: nn.ModuleList, attentions: nn.ModuleList | None, *, first: bool, last: bool) -> None:
        super().__init__(resnets, attentions)
        self.first, self.last = first, last

    def forward(self, x: Tensor, time: Moment, context: Context, skips: list[Tensor]) -> Tensor:
        """Map x (B, C, H, W) to (B, C', 2H, 2W); pop its skip connection from the end of the list."""
        x = self._through(x if self.first else torch.cat([x, skips.pop()], dim=1), time, context)
        return x if self.last else _doubled(x)


def _filter(x: Tensor) -> Tensor:
    """Return the outer product of (1, 3, 3, 1) / 8 with itself for each channel: (C, 1, 4, 4)."""
    taps = x.new_tensor((1.0, 3.0, 3.0, 1.0)) / 8
    return torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)


def _halved(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), _filter(x), stride=2, groups=x.shape[1])


def _doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W)."""
    wide = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv_transpose2d(wide, 4 * _filter(x), stride=2, padding=3, groups=x.shape[1])
