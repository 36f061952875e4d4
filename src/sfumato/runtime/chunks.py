"""How attention is split to bound the memory of its scores, and images into tiles: the arithmetic alone."""

from __future__ import annotations

__all__ = ["attention_chunk", "tile_starts"]


def attention_chunk(pairs: int, queries: int, keys: int, element_size: int, max_bytes: int) -> tuple[int, int]:
    """(Image, head) pairs and queries to take at a time, so that their scores take at most `max_bytes`.

    All queries of as many pairs as fit; where not even one pair does, as many queries of one pair as fit. Never less
    than one query of one pair: a row of scores is not cut.
    """
    row = keys * element_size
    at_once = max(1, min(queries, max_bytes // row))
    return (max(1, min(pairs, max_bytes // (row * queries))), queries) if at_once == queries else (1, at_once)


def tile_starts(side: int, size: int) -> list[int]:
    """Where tiles of a size begin, so that a side is covered and each overlaps the next by a quarter or more."""
    count = 1 + max(0, -(-(side - size) // max(1, size * 3 // 4)))
    return [round(i * (side - size) / (count - 1)) for i in range(count)] if count > 1 else [0]
