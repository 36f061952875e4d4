"""The U-Net's spatial transformer: image tokens attend to each other and to the prompt."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.attention import Context, SelfOrCrossAttention
from sfumato.models.blocks import GroupNorm
from sfumato.models.recomputed import Recomputed

__all__ = ["GEGLU", "BasicTransformerBlock", "FeedForward", "Transformer2DModel"]


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another ("GLU Variants Improve Transformer", arXiv 2002.05202)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C')."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels)]
        )

    # Tokens computed together, at most. What lies between the layers is eight times as wide as they, so where memory is
    # slow, a stretch of tokens that stays in the cache is faster than all of them at once.
    stretch: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if self.stretch is None:
            return self._through(x)
        tokens = x.flatten(0, 1)
        parts = tokens.tensor_split(math.ceil(tokens.shape[0] / self.stretch))
        return torch.cat([self._through(part) for part in parts]).view(x.shape)

    def _through(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each normalized before and added after."""

    def __init__(
        self, channels: int, heads: int, context: int, *, only_cross_attention: bool, upcast: bool, dropout: float
    ) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        first_context = context if only_cross_attention else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfOrCrossAttention(channels, heads, context=first_context, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = SelfOrCrossAttention(channels, heads, context=context, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    @property
    def reading(self) -> tuple[SelfOrCrossAttention, ...]:
        """The layers that read the prompt."""
        return (self.attn1, self.attn2) if self.only_cross_attention else (self.attn2,)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """X (B or a divisor of it, L, C), context of B prompts -> (B, L, C)."""
        if self.only_cross_attention:
            x = context.widen(x)
            x = x + self.attn1(self.norm1(x), context, context.mask)
        else:
            x = x + self.attn1(self.norm1(x), None, context.mask)
        x = context.widen(x)
        x = x + self.attn2(self.norm2(x), context, context.states_mask)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(Recomputed):
    """Transformer blocks over the pixels of a feature map, with a shortcut around them."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context: int,
        *,
        layers: int,
        groups: int,
        use_linear_projection: bool,
        only_cross_attention: bool,
        upcast: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.use_linear_projection = use_linear_projection
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels, heads, context, only_cross_attention=only_cross_attention, upcast=upcast, dropout=dropout
            )
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if use_linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """X (B or a divisor of it, C, H, W), context of B prompts -> (B, C, H, W)."""
        height, width = x.shape[2:]
        # Tokens want their channels side by side; the image keeps the layout in which it came.
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        h = self.norm(x)
        if not self.use_linear_projection:
            h = self.proj_in(h)
        # A copy: Metal has multiplied transposed views wrongly in float32 (pytorch#193487).
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, H W, C)
        if self.use_linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.use_linear_projection:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width)).contiguous(memory_format=layout)
        if not self.use_linear_projection:
            h = self.proj_out(h)
        return context.widen(x) + h
