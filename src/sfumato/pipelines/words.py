"""Which words a small model knows, so that a prompt without any of them is answered honestly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sfumato.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Words"]

# They stand in names ("slice of pizza") without being the thing that is drawn.
SMALL = frozenset(["a", "an", "and", "at", "for", "in", "of", "on", "the", "to", "with"])


@dataclass(frozen=True)
class Words:
    """What a checkpoint can draw: its names of things, and its styles."""

    names: tuple[str, ...]
    styles: tuple[str, ...]
    words: frozenset[str]

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """From `words.json` beside the index; None for a checkpoint without, which is one of many words."""
        path = folder / "words.json"
        if not path.is_file():
            return None
        told = read_json(path)
        names = [name for names in told["concepts"].values() for name in names]
        first = tuple(names[0] for names in told["concepts"].values())
        return cls(first, tuple(told["styles"]), frozenset(_words(" ".join(names))))

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """A sentence for each prompt that names nothing this model can draw."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip() and not self._knows(prompt)]
        # From different parts of the list, which is sorted by kind.
        examples = ", ".join(self.names[len(self.names) * part // 4] for part in (1, 2, 3))
        return [
            f"the small model does not know {prompt!r}, so the picture is a guess; of the {len(self.names)} things it "
            f"knows, try one such as {examples} ('sfumato show' tells more)"
            for prompt in unknown
        ]

    def _knows(self, prompt: str) -> bool:
        words = _words(prompt)
        return not self.words.isdisjoint(words | {word.removesuffix("s") for word in words})


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - SMALL
