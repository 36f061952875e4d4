"""The vocabulary of a small model, used to warn about words in a prompt that it does not know."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from sfumato.files import read_json
from sfumato.values import Within, check_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Words"]

Name = Annotated[str, Within(1, 100)]
Names = Annotated[tuple[Name, ...], Within(1, 1000)]
Kinds = Annotated[dict[Name, Names], Within(1, 10**4)]
# Words that mean nothing by themselves, although some are part of names ("slice of pizza").
SMALL = frozenset(
    ["a", "an", "and", "are", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on", "that", "the", "this"]
) | {"to", "very", "with"}


@dataclass(frozen=True)
class Words:
    """The vocabulary of a small checkpoint.

    names: one name of each thing; styles: names of styles; words: words that mean a thing; grammar: all words it was
    trained with, such as colors and prepositions.
    """

    names: tuple[str, ...]
    styles: tuple[str, ...]
    words: frozenset[str]
    grammar: frozenset[str] = frozenset()

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Read `words.json` next to the index; None for a checkpoint without it, which has no limited vocabulary.

        Raises `CheckpointError` or `ConfigError` if the file is invalid.
        """
        path = folder / "words.json"
        if not os.path.lexists(path):
            return None
        told: dict[str, Any] = {"said": ["a"]} | read_json(path)
        for key, kind in (("concepts", Kinds), ("styles", Kinds), ("said", Names)):
            check_value(str(path), key, told.get(key), kind)
        names = [name for names in told["concepts"].values() for name in names]
        first = tuple(names[0] for names in told["concepts"].values())
        # Styles, colors and numbers occur in names too ("flat shoe", "blue heart") and are not things by themselves.
        said = [*told["said"], *(word for words in told["styles"].values() for word in words)]
        alone = {name for name in names if " " not in name}
        things, grammar = set(_words(" ".join(names))), set(_words(" ".join(said)))
        return cls(first, tuple(told["styles"]), frozenset((things - grammar) | alone), frozenset(things | grammar))

    def notes(self, prompts: Sequence[str], read: Callable[[str], str] = str) -> list[str]:
        """Return a note for each prompt with words that this model does not know.

        read: a function that removes a prompt's syntax and returns its plain words.
        """
        return [note for prompt in dict.fromkeys(prompts) for note in self._notes(prompt, read(prompt))]

    def _notes(self, prompt: str, said: str) -> list[str]:
        words = _words(said)
        if not said.strip():
            return []
        unknown = [word for word in words if not _forms(word) & self.grammar]
        if not any(_forms(word) & self.words for word in words):
            # The list is sorted by kind, so these examples are of different kinds.
            examples = ", ".join(self.names[len(self.names) * part // 4] for part in (1, 2, 3))
            return [
                f"the small model does not know {prompt!r}, so the image is a guess; of the {len(self.names)} things "
                f"it knows, try one such as {examples} ('sfumato show' lists all)"
            ]
        if unknown:
            listed = ", ".join(map(repr, unknown[:6])) + (", …" if len(unknown) > 6 else "")
            return [
                f"the small model knows {prompt!r} only in part and ignores {listed}; the image will not "
                "match the prompt"
            ]
        return []


def _words(text: str) -> dict[str, None]:
    """Return the meaningful words of a text in order, without repetitions."""
    return dict.fromkeys(word for word in re.findall(r"\w+", text.lower()) if word not in SMALL)


def _forms(word: str) -> set[str]:
    """Return a word and its possible singular forms."""
    return {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
