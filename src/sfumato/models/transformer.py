"""The U-Net's spatial transformer: image tokens attend to each other and to the prompt."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels.gpu import GpuKernels, gpu_kernels
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
        x = self.proj(x)
        kernels = gpu_kernels(x)
        if kernels is not None:
            return kernels.geglu(x)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels)]
        )

    # The maximum number of tokens to compute together. The intermediate tensor is eight times as wide, so where memory
    # is slow, it is faster to process tokens in stretches that fit into the cache.
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
    """Self-attention, cross-attention and feed-forward, each with a layer norm before and a residual connection."""

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
        """The layers that attend to the prompt."""
        return (self.attn1, self.attn2) if self.only_cross_attention else (self.attn2,)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map x (B or a divisor of B, L, C) and a context of B prompts to (B, L, C)."""
        kernels = gpu_kernels(x, self.norm1, self.norm2, self.norm3)
        if kernels is not None and not self.only_cross_attention:
            return self._fused(kernels, x, context)
        if self.only_cross_attention:
            x = context.widen(x)
            x = x + self.attn1(self.norm1(x), context, context.mask)
        else:
            x = x + self.attn1(self.norm1(x), None, context.mask)
        x = context.widen(x)
        x = x + self.attn2(self.norm2(x), context, context.states_mask)
        return x + self.ff(self.norm3(x))

    def _fused(self, kernels: GpuKernels, x: Tensor, context: Context) -> Tensor:
        """The same, with each residual connection added by the normalization that follows it."""
        y = self.attn1(kernels.add_norm(x, None, self.norm1)[1], None, context.mask)
        x, y = kernels.add_norm(context.widen(x), context.widen(y), self.norm2)
        x, y = kernels.add_norm(x, self.attn2(y, context, context.states_mask), self.norm3)
        return x + self.ff(y)


class Transformer2DModel(Recomputed):
    """Transformer blocks over the pixels of a feature map, with a residual connection."""

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
        """Map x (B or a divisor of B, C, H, W) and a context of B prompts to (B, C, H, W)."""
        height, width = x.shape[2:]
        # Tokens need contiguous channels; the image keeps its memory format.
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        h = self.norm(x)
        # A 1 × 1 convolution of contiguous channels is a product of tokens, which adds its bias by itself.
        linear = self.use_linear_projection or gpu_kernels(x, self.proj_in, self.proj_out) is not None
        if not linear:
            h = self.proj_in(h)
        # A copy: Metal has multiplied transposed views wrongly in float32 (pytorch#193487).
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, H W, C)
        if linear:
            h = _over_tokens(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if linear:
            h = _over_tokens(self.proj_out, h)
        h = h.transpose(1, 2).unflatten(2, (height, width)).contiguous(memory_format=layout)
        if not linear:
            h = self.proj_out(h)
        return context.widen(x) + h


def _over_tokens(layer: nn.Module, h: Tensor) -> Tensor:
    """Apply a linear layer or a 1 × 1 convolution to tokens (B, L, C)."""
    return F.linear(h, layer.weight.flatten(1), layer.bias) if isinstance(layer, nn.Conv2d) else layer(h)
