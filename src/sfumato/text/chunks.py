"""Long prompts: weighted tokens in chunks of the model's length, each encoded separately."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.text.embeddings import pieces
from sfumato.text.grammars import BREAK

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["Chunks", "chunked", "from_empty", "with_mean"]

# In a full chunk, what follows a comma among this many last tokens moves to the next chunk, to keep phrases intact.
BACK = 20
# ComfyUI does not split spans of fewer tokens than this.
WHOLE = 8

Span = tuple[str, float]


@dataclass(frozen=True)
class Chunks:
    """N chunks of token ids (N, S), including start, end and padding, and the weight of each token (N, S)."""

    ids: Tensor
    weights: Tensor


def chunked(
    tokenizer: CLIPTokenizer, spans: Sequence[Span], syntax: str, words: Mapping[str, Sequence[int]] | None = None
) -> Chunks:
    """Split a prompt's spans into chunks, as A1111 or ComfyUI does; at least one chunk, which may be empty.

    words: ids of textual inversions by name (text/embeddings.py). They are never split if they fit into a chunk.
    """
    room = tokenizer.model_max_length - 2
    rows: list[list[tuple[int, float]]] = [[]]
    comma = tokenizer.ids(",")[:1]
    for text, weight in spans:
        if (text, weight) == BREAK:
            rows.append([])
            continue
        for _, piece, own in pieces(text, words or {}):
            tokens = [(token, weight) for token in own or tokenizer.ids(piece)]
            if own and len(rows[-1]) + len(own) > room:
                rows.append([])
            if syntax == "comfyui":
                _append_whole(rows, tokens, room)
            else:
                _append(rows, tokens, room, comma)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.full((len(rows), room + 2), pad, dtype=torch.long)
    weights = torch.ones(len(rows), room + 2)
    for i, row in enumerate(rows):
        ids[i, : len(row) + 2] = torch.tensor([start, *(token for token, _ in row), end])
        weights[i, 1 : len(row) + 1] = torch.tensor([weight for _, weight in row])
    return Chunks(ids, weights)


def _append(
    rows: list[list[tuple[int, float]]], tokens: Sequence[tuple[int, float]], room: int, comma: list[int]
) -> None:
    """Append like A1111: break a full chunk after its last comma if there is one nearby."""
    for token in tokens:
        row = rows[-1]
        if len(row) == room:
            last = next((i for i in range(room - 1, -1, -1) if row[i][0] in comma), None)
            moved = row[last + 1 :] if last is not None and room - last <= BACK and token[0] not in comma else []
            rows[-1] = row[: room - len(moved)]
            rows.append(list(moved))
        rows[-1].append(token)


def _append_whole(rows: list[list[tuple[int, float]]], tokens: Sequence[tuple[int, float]], room: int) -> None:
    """Append like ComfyUI: a short span that does not fit moves to the next chunk as a whole, a long one is split."""
    while tokens:
        left = room - len(rows[-1])
        if len(tokens) <= left:
            rows[-1] += tokens
            return
        if len(tokens) >= WHOLE:
            rows[-1] += tokens[:left]
            tokens = tokens[left:]
        rows.append([])


def with_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Weight states (N, S, C) like A1111: multiply, then restore the mean of each chunk."""
    before = states.mean(dim=(1, 2), keepdim=True)
    weighted = states * weights[:, :, None]
    return weighted * (before / weighted.mean(dim=(1, 2), keepdim=True))


def from_empty(states: Tensor, weights: Tensor, empty: Callable[[], Tensor]) -> Tensor:
    """Weight states like ComfyUI: extrapolate from the empty prompt's states (1, S, C) at the same position."""
    nothing = empty()
    return nothing + weights[:, :, None] * (states - nothing)
