"""Exact forms of attention for kernels that are fast or correct only for some shapes: padded heads and split keys.

Both compute softmax(q k^T / sqrt(d) + mask) v, equal to torch's own up to the order of its sums. Shapes as in
models/attention.py: q (B, heads, L, d); k, v (B, heads, S, d); mask None or broadcastable to (B, heads, L, S), added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.runtime.chunks import attention_chunk

__all__ = ["padded", "split"]

_Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def padded(widths: Sequence[int], otherwise: _Attention) -> _Attention:
    """Return torch's fused attention with heads zero-padded to the next of the ascending `widths`.

    Zeros add nothing to q k^T, and only zeros to the output, which are cut off. Wider heads use `otherwise`.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        own = q.shape[-1]
        wide = next((width for width in widths if width >= own), None)
        if wide is None:
            return otherwise(q, k, v, mask)
        if wide > own:
            q, k, v = (F.pad(x, (0, wide - own)) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=own**-0.5)[..., :own]

    return attention


def split(max_bytes: int, max_keys: int) -> _Attention:
    """Return attention by plain products over at most `max_keys` keys and `max_bytes` of scores at a time.

    A running maximum and a running sum join the pieces ("Online normalizer calculation for softmax", arXiv 1805.02867,
    algorithm 3), in float32 or wider. A query whose keys are all masked gives zeros. Raises `UsageError` for a limit
    below 1.
    """
    if min(max_bytes, max_keys) < 1:
        raise UsageError(f"attention needs at least one byte and one key at a time, not {max_bytes} and {max_keys}")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, heads, length, width = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        rows, keys, values = (x.to(dtype).flatten(0, 1) for x in (q * 1, k, v))
        rows = rows * width**-0.5
        masks = None
        if mask is not None:
            masks = mask.expand(batch, heads, mask.shape[-2], k.shape[2]).to(dtype).flatten(0, 1)
        at_once = min(max_keys, k.shape[2])
        pairs, queries = attention_chunk(batch * heads, length, at_once, dtype.itemsize, max_bytes)
        out = torch.empty_like(values[:, :1]).expand(-1, length, -1).contiguous()
        for first in range(0, batch * heads, pairs):
            some = slice(first, first + pairs)
            for start in range(0, length, queries):
                part = slice(start, start + queries)
                own = None if masks is None else masks[some, part if masks.shape[1] > 1 else slice(None)]
                out[some, part] = _joined(rows[some, part], keys[some], values[some], own, at_once)
        return out.view(batch, heads, length, -1).to(q.dtype)

    return attention


def _joined(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_keys: int) -> Tensor:
    """Compute some queries (N, L, d), already scaled, over all keys (N, S, d)."""
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:2], v.shape[-1])
    for start in range(0, k.shape[1], max_keys):
        part = slice(start, start + max_keys)
        scores = q @ k[:, part].transpose(1, 2)
        scores = scores if mask is None else scores + mask[..., part]
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = new.masked_fill(new == -torch.inf, 0.0)  # only masked keys so far
        weights, decay = (scores - base).exp(), (top - base).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + weights @ v[:, part]
        top = new
    return out / total.masked_fill(total == 0, 1.0)
