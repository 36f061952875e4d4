"""Attention: one function `(q, k, v, mask) -> out`, chosen once and passed to the models that use it.

All implementations compute softmax(q k^T / sqrt(d) + mask) v ("Attention Is All You Need", arXiv 1706.03762, eq. 1)
and differ only in peak memory. Shapes: q (B, heads, L, d); k and v (B, heads, S, d); mask None or a float tensor that
broadcasts to (B, heads, L, S) and is added to the scores; out (B, heads, L, d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.runtime.attention import split
from sfumato.runtime.chunks import attention_chunk
from sfumato.runtime.faults import SPLIT_KEYS
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Attending",
    "AttentionFunction",
    "AttentionUser",
    "Context",
    "SelfOrCrossAttention",
    "attention_for",
    "chunked",
    "sdpa",
    "sliced",
    "upcast",
]

# Metal refuses buffers of 2**32 bytes; a quarter of that leaves room for the softmax in addition to the scores.
MPS_SCORE_BYTES = 2**30

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention with torch's fused scaled dot product attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliced(slice_size: int) -> AttentionFunction:
    """Return an attention function that computes at most `slice_size` (image, head) pairs at a time, to save memory.

    The results are the same. Raises `UsageError` for a size below 1.
    """
    if slice_size < 1:
        raise UsageError(f"the attention slice size must be at least 1, not {slice_size}")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, heads = q.shape[:2]
        if batch * heads <= slice_size:
            return sdpa(q, k, v, mask)
        rows_q, rows_k, rows_v = (x.flatten(0, 1) for x in (q, k, v))
        rows_mask = None if mask is None else mask.expand(batch, heads, *mask.shape[-2:]).flatten(0, 1)
        out = torch.empty_like(rows_q)
        for start in range(0, batch * heads, slice_size):
            part = slice(start, start + slice_size)
            part_mask = None if rows_mask is None else rows_mask[part]
            out[part] = sdpa(rows_q[part], rows_k[part], rows_v[part], part_mask)
        return out.view(batch, heads, *out.shape[1:])

    return attention


def chunked(max_bytes: int, max_keys: int | None = None) -> AttentionFunction:
    """Return an attention function whose score matrix never exceeds `max_bytes`.

    It first reduces the number of (image, head) pairs at a time, then the number of queries. More than `max_keys` keys
    are split (runtime/attention.py). Raises `UsageError` for a limit below one byte.
    """
    if max_bytes < 1:
        raise UsageError(f"the attention budget must be at least one byte, not {max_bytes}")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, heads, length = q.shape[:3]
        if max_keys is not None and k.shape[2] > max_keys:
            return split(max_bytes, max_keys)(q, k, v, mask)
        # Kernels for few queries have misread permuted tensors on Metal (pytorch#181133).
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        pairs, queries = attention_chunk(batch * heads, length, k.shape[2], q.element_size(), max_bytes)
        if queries == length:
            return sliced(pairs)(q, k, v, mask)
        one_pair = sliced(1)
        out = torch.empty_like(q)
        for start in range(0, length, queries):
            part = slice(start, start + queries)
            part_mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
            out[:, :, part] = one_pair(q[:, :, part], k, v, part_mask)
        return out

    return attention


def upcast(attention: AttentionFunction, dtype: torch.dtype) -> AttentionFunction:
    """Wrap an attention function to compute in a wider dtype, for devices where scores overflow in a narrow one."""

    def wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.to(dtype)
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), mask).to(q.dtype)

    return wide


def attention_for(device: torch.device) -> AttentionFunction:
    """Return torch's fused attention, or chunked attention on MPS, which stores scores and limits buffer sizes."""
    return chunked(MPS_SCORE_BYTES, SPLIT_KEYS) if device.type == "mps" else sdpa


class Attending(nn.Module):
    """A layer with a number of heads and a replaceable attention function."""

    attention: AttentionFunction

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = sdpa


class Context:
    """What transformers attend to besides the image: the prompt (B, S, C) and, rarely, masks added to the scores.

    Each layer's keys and values are computed once and cached (unless `keep=False`), so that they are only projected in
    the first step of a run. The prompt's batch may be a multiple of the image's: the image is repeated only where the
    two first meet, because guidance branches are identical up to there.
    """

    def __init__(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        states_mask: Tensor | None = None,
        *,
        keep: bool = True,
        images: Sequence[Any] = (),
    ) -> None:
        """images: the `ImageTokens` (models/ip_adapter.py) to attend to in addition to the prompt."""
        self.states, self.mask, self.states_mask, self.keep = states, mask, states_mask, keep
        self.images = images
        self._projections: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def through(self, layer: SelfOrCrossAttention) -> tuple[Tensor, Tensor]:
        """Return the prompt's keys and values in a layer, each (B, heads, S, d)."""
        if layer in self._projections:
            return self._projections[layer]
        projections = layer.keys_and_values(self.states)
        if self.keep:
            self._projections[layer] = projections
        return projections

    def widen(self, x: Tensor) -> Tensor:
        """Repeat x to the batch size of the prompt."""
        times = self.states.shape[0] // x.shape[0]
        return x if times <= 1 else torch.cat([x] * times)


class SelfOrCrossAttention(Attending):
    """Multi-head self-attention, or cross-attention to a context.

    Parameter names are those of diffusers: `to_q`, `to_k`, `to_v`, `to_out.0`.
    """

    def __init__(
        self, channels: int, heads: int, *, context: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__(heads)
        self.upcast = upcast
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context or channels, channels, bias=bias)
        self.to_v = nn.Linear(context or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Identity()])

    def forward(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, L, C) to the context, or to itself if None; return (B, L, C)."""
        q = self._split(self.to_q(x))
        k, v = self.keys_and_values(x) if context is None else context.through(self)
        if self.upcast and q.dtype == torch.float16:
            # Stable Diffusion 2.x: q k^T overflows in float16.
            mask = None if mask is None else mask.float()
            out = self.attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
        else:
            out = self.attention(q, k, v, mask)
        for image in () if context is None else context.images:
            seen = image.added(self, q)
            out = out if seen is None else out + seen
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project what is attended to: (B, S, C') -> keys and values, each (B, heads, S, d)."""
        return self._split(self.to_k(states)), self._split(self.to_v(states))

    def _split(self, x: Tensor) -> Tensor:  # (B, L, C) -> (B, heads, L, d)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AttentionUser(nn.Module):
    """A model with modules that call an attention function."""

    def attention_modules(self) -> Iterator[Attending]:
        """Return the modules that have an `attention` function and a number of `heads`."""
        return (module for module in self.modules() if isinstance(module, Attending))

    def set_attention(self, attention: AttentionFunction) -> None:
        """Use this attention function in every layer."""
        for module in self.attention_modules():
            module.attention = attention

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices: `"auto"` half the heads at a time, `"max"` one head, or a number of heads.

        None computes all at once. Raises `UsageError` for any other value, or for more heads than the smallest layer
        has.
        """
        modules = list(self.attention_modules())
        fewest = min((module.heads for module in modules), default=1)
        if slice_size is None:
            return self.set_attention(sdpa)
        if not isinstance(slice_size, int) and not (isinstance(slice_size, str) and slice_size in ("auto", "max")):
            raise UsageError(f"slice_size must be 'auto', 'max', a number of heads or None, not {shown(slice_size)}")
        if isinstance(slice_size, int) and not 1 <= slice_size <= fewest:
            raise UsageError(
                f"slice_size must be from 1 to {fewest} (the heads of the smallest layer), not {slice_size}"
            )
        for module in modules:
            heads = module.heads
            size = (
                {"auto": max(1, heads // 2), "max": 1}.get(slice_size, heads)
                if isinstance(slice_size, str)
                else slice_size
            )
            module.attention = sliced(size)
        return None
