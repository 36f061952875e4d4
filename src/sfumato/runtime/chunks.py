"""The arithmetic of splitting attention, to limit the memory of its scores, and of splitting images into tiles."""

from __future__ import annotations

__all__ = ["attention_chunk", "tile_starts"]


def attention_chunk(pairs: int, queries: int, keys: int, element_size: int, max_bytes: int) -> tuple[int, int]:
    """Return how many (image, head) pairs and queries to process at a time so that scores take at most `max_bytes`.

    These are all queries of as many pairs as fit, or else as many queries of one pair as fit, but at least one query of
    one pair: a row of scores is never split.
    """
    row = keys * element_size
    at_once = max(1, min(queries, max_bytes // row))
    return (max(1, min(pairs, max_bytes // (row * queries))), queries) if at_once == queries else (1, at_once)


def tile_starts(side: int, size: int) -> list[int]:
    """Return the start positions of tiles that cover a side, where neighbors overlap by at least a quarter."""
    count = 1 + max(0, -(-(side - size) // max(1, size * 3 // 4)))
    return [round(i * (side - size) / (count - 1)) for i in range(count)] if count > 1 else [0]
