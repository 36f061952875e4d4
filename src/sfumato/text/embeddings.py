"""Textual inversion (arXiv 2208.01618): learned vectors that replace their name in a prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = ["Embedding", "NewWords", "pieces"]


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion: its names in prompts, and its vectors (n, C) by the width C of the text encoder."""

    names: tuple[str, ...]
    vectors: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class NewWords:
    """Textual inversions for one text encoder: ids beyond its vocabulary by name, and their vectors (K, C)."""

    ids: Mapping[str, tuple[int, ...]]
    vectors: Tensor | None = None

    @classmethod
    def of(cls, embeddings: Sequence[Embedding], width: int, first: int) -> NewWords:
        """Number the embeddings of this width from `first` on. If two share a name, the later one wins."""
        ids: dict[str, tuple[int, ...]] = {}
        rows: list[Tensor] = []
        for embedding in embeddings:
            if width in embedding.vectors:
                start = first + sum(map(len, rows))
                rows.append(embedding.vectors[width])
                own = tuple(range(start, start + len(rows[-1])))
                ids |= {name.lower(): own for name in embedding.names}
        return cls(ids, torch.cat(rows) if rows else None)


def pieces(text: str, ids: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, str, Sequence[int]]]:
    """Split a text at embedding names; yield the position of each piece, its text, and the ids if it is a name.

    A name matches as a whole word, ignoring case, either alone, in angle brackets, or as `embedding:name`.
    """
    begin = 0
    for found in _pattern(ids).finditer(text) if ids else ():
        yield begin, text[begin : found.start()], ()
        yield found.start(), found[0], ids[next(name for name in found.groups() if name).lower()]
        begin = found.end()
    yield begin, text[begin:], ()


def _pattern(ids: Mapping[str, Sequence[int]]) -> re.Pattern[str]:
    every = []
    for name in sorted(ids, key=len, reverse=True):
        word = f"({re.escape(name)})"
        before, after = (r"(?<!\w)" if name[0].isalnum() else ""), (r"(?!\w)" if name[-1].isalnum() else "")
        every += [rf"embedding:{word}(?:\.(?:pt|bin|safetensors))?{after}", f"<{word}>", f"{before}{word}{after}"]
    return re.compile("|".join(every), re.IGNORECASE)
