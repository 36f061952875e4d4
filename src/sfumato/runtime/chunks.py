"""How attention is cut so that its scores stay below a number of bytes: the arithmetic alone."""

from __future__ import annotations

__all__ = ["attention_chunk"]


def attention_chunk(pairs: int, queries: int, keys: int, element_size: int, max_bytes: int) -> tuple[int, int]:
    """(Image, head) pairs and queries to take at a time, so that their scores take at most `max_bytes`.

    All queries of as many pairs as fit; where not even one pair does, as many queries of one pair as fit. Never less
    than one query of one pair: a row of scores is not cut.
    """
    row = keys * element_size
    at_once = max(1, min(queries, max_bytes // row))
    return (max(1, min(pairs, max_bytes // (row * queries))), queries) if at_once == queries else (1, at_once)
