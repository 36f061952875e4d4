"""The three attention implementations used with Core ML, on (B, C, 1, S) with heads side by side in the channels.

All compute softmax(q k^T / sqrt(d) + mask) v ("Attention Is All You Need", arXiv 1706.03762, eq. 1). Which one is
fastest depends on the hardware: see "Deploying Transformers on the Apple Neural Engine" (Apple, 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import Handle
from sfumato.coreml.converter.factors import two_factors
from sfumato.errors import UsageError, suggest

__all__ = ["ATTENTIONS", "CHUNK", "AttentionForm", "attention_named", "original", "split_einsum", "split_einsum_v2"]

# Queries per block in `split_einsum_v2`.
CHUNK = 512

# (builder, q (B, C, 1, L), k and v (B, C, 1, S), heads, mask (L, S) to add to the scores or None) -> (B, C, 1, L)
AttentionForm = Callable[[Builder, Handle, Handle, Handle, int, np.ndarray | None], Handle]


def original(b: Builder, q: Handle, k: Handle, v: Handle, heads: int, mask: np.ndarray | None = None) -> Handle:
    """Compute all heads at once, as batched matrix products: for GPUs."""
    batch, channels, _, length = q.shape
    width = channels // heads
    q, k = _scaled(b, q, k, width)
    q, k, v = (b.reshape(x, (batch, heads, width, x.shape[3])) for x in (q, k, v))
    scores = b.matmul(q, k, transpose_x=True)
    if mask is not None:
        scores = b.add(scores, mask[None, None])
    mixed = b.matmul(v, b.softmax(scores, 3), transpose_y=True)
    return b.reshape(mixed, (batch, channels, 1, length))


def split_einsum(b: Builder, q: Handle, k: Handle, v: Handle, heads: int, mask: np.ndarray | None = None) -> Handle:
    """Compute one head at a time, with the keys transposed once: for the Neural Engine."""
    return _split(b, q, k, v, heads, mask, q.shape[3])


def split_einsum_v2(b: Builder, q: Handle, k: Handle, v: Handle, heads: int, mask: np.ndarray | None = None) -> Handle:
    """Compute one head and at most 512 queries at a time, for any number of queries: for the Neural Engine."""
    return _split(b, q, k, v, heads, mask, CHUNK)


ATTENTIONS: Mapping[str, AttentionForm] = {
    "original": original,
    "split_einsum": split_einsum,
    "split_einsum_v2": split_einsum_v2,
}


def attention_named(name: str) -> AttentionForm:
    """Return the attention of this name. Raises `UsageError` if there is none."""
    if name not in ATTENTIONS:
        raise UsageError(f"there is no attention {name!r}{suggest(name, ATTENTIONS)}; use {', '.join(ATTENTIONS)}")
    return ATTENTIONS[name]


def _split(b: Builder, q: Handle, k: Handle, v: Handle, heads: int, mask: np.ndarray | None, chunk: int) -> Handle:
    length, width = q.shape[3], q.shape[1] // heads
    q, k = _scaled(b, q, k, width)
    keys = b.transpose(k, (0, 3, 2, 1))  # (B, S, 1, C)
    # Keys come first in the scores (B, S, 1, L), so that the softmax runs along the channels' axis.
    added = None if mask is None else mask.T[None, :, None]
    mixed = []
    for head in range(heads):
        start, stop = head * width, (head + 1) * width
        head_q, head_k = b.slice(q, 1, start, stop), b.slice(keys, 3, start, stop)
        head_v = b.slice(v, 1, start, stop)
        parts = []
        for first in range(0, length, chunk):
            last = min(first + chunk, length)
            scores = b.einsum("bkhc,bchq->bkhq", head_k, b.slice(head_q, 3, first, last))
            if added is not None:
                scores = b.add(scores, np.ascontiguousarray(added[..., first:last]))
            parts.append(b.einsum("bchk,bkhq->bchq", head_v, b.softmax(scores, 1)))
        mixed.append(b.concat(parts, 3))
    return b.concat(mixed, 1)


def _scaled(b: Builder, q: Handle, k: Handle, width: int) -> tuple[Handle, Handle]:
    """Scale queries and keys instead of the scores: together, the two factors are 1 / sqrt(d).

    Queries and keys have fewer elements, their products stay further below float16's maximum, and the two factors are
    exact in float16 even if their product is not (docs/adr/0010).
    """
    of_queries, of_keys = two_factors(width**-0.5, q.dtype)
    return b.mul(q, of_queries), k if of_keys == 1 else b.mul(k, of_keys)
