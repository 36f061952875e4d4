"""Weighted prompts in A1111's and ComfyUI's syntax, as weighted spans of text. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "BREAK",
    "MOST_DEPTH",
    "Read",
    "Span",
    "a1111",
    "comfyui",
    "joined",
    "named_adapters",
    "subprompts",
    "without_extras",
]

# A pseudo-span that ends a chunk.
BREAK = ("BREAK", -1.0)
# Brackets nested deeper are plain text.
MOST_DEPTH = 200
EXTRA = re.compile(r"<(lora|lyco|hypernet):([^<>\n]{1,200})>")
AND = re.compile(r"\bAND\b")
OWN_WEIGHT = re.compile(r"(.*?)(?:\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+)))?\s*", re.DOTALL)
# An adapter's name, and its weights for the text encoders and the U-Net.
_WEIGHT = r"([+-]?(?:\d+\.?\d*|\.\d+))"
ADAPTER = re.compile(rf"<(?:lora|lyco):([^<>:\n]{{1,200}})(?::(?:te=)?{_WEIGHT})?(?::(?:unet=)?{_WEIGHT})?>")

Span = tuple[str, float]


@dataclass(frozen=True)
class Read:
    """A parsed prompt: weighted spans, and a note for each part that is not supported.

    parts: sub-prompts and their weights, if there are several. how: "blend" mixes them, "sum" mixes them without
    normalizing the weights, "and" concatenates them.
    """

    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()
    parts: tuple[tuple[Read, float], ...] = ()
    how: str = ""

    @property
    def plain(self) -> bool:
        """Whether the prompt has no weights or chunk breaks, so that it equals plain text."""
        return not self.parts and all(weight == 1 for _, weight in self.spans)


PIECE = re.compile(r"\\[\\()\[\]]|\\|[()\[\]]|:\s*([+-]?\d*\.?\d+)\s*\)|[^\\()\[\]:]+|:")


def a1111(text: str) -> Read:
    r"""Parse A1111's syntax: `(a)` weighs 1.1, `[a]` 1 / 1.1, `(a:1.3)` 1.3; they can be nested; `\(` is a bracket.

    `BREAK` ends a chunk. An unclosed bracket is plain text and gives a note.
    """
    text, extras = without_extras(text)
    texts: list[str] = []  # a bracket counts as text until it is closed
    weights: list[float] = []
    round_: list[int] = []
    square: list[int] = []

    def weigh(start: int, factor: float) -> None:
        texts[start] = ""
        weights[start + 1 :] = [weight * factor for weight in weights[start + 1 :]]

    for piece in PIECE.finditer(text):
        part, number = piece[0], piece[1]
        opened = {"(": round_, "[": square}.get(part)
        if opened is not None and len(round_) + len(square) < MOST_DEPTH:
            opened.append(len(texts))
        if number is not None and round_:
            weigh(round_.pop(), float(number))
        elif part == ")" and round_:
            weigh(round_.pop(), 1.1)
        elif part == "]" and square:
            weigh(square.pop(), 1 / 1.1)
        else:
            texts.append(part[1:] if len(part) == 2 and part[0] == "\\" else part)
            weights.append(1.0)
    notes = [f"an unclosed bracket is read as plain text: {text[:80]!r}"] if round_ or square else []
    notes += [
        f"{extra} in the prompt is ignored; load adapters with --lora, or give their folder with --lora-dir"
        for extra in extras
    ]
    if AND.search(text):
        notes.append("AND in the negative prompt is read as a word and does not join prompts")
    return Read(joined(_broken(list(zip(texts, weights, strict=True)))), tuple(notes))


def _broken(spans: list[Span]) -> list[Span]:
    """Split spans at `BREAK`, which becomes a separate span."""
    found: list[Span] = []
    for text, weight in spans:
        first, *more = re.split(r"\s*\bBREAK\b\s*", text)
        found.append((first, weight))
        for part in more:
            found += [BREAK, (part, weight)]
    return found


def subprompts(text: str, syntax: str) -> list[tuple[str, float]]:
    """Split a prompt at A1111's `AND`, as in `a AND b :0.5`, into prompts with weights (default: 1)."""
    if syntax != "a1111" or not AND.search(text):
        return [(text, 1.0)]
    found = [OWN_WEIGHT.fullmatch(one) for one in AND.split(text)]
    return [(one[1], float(one[2] or 1)) for one in found if one is not None]


def joined(spans: list[Span]) -> tuple[Span, ...]:
    """Drop empty spans and merge neighbors of the same weight."""
    found: list[Span] = []
    for text, weight in spans:
        if not text:
            continue
        if found and found[-1][1] == weight and weight != BREAK[1]:
            found[-1] = (found[-1][0] + text, weight)
        else:
            found.append((text, weight))
    return tuple(found) or (("", 1.0),)


def comfyui(text: str) -> Read:
    r"""Parse ComfyUI's syntax: `(a)` multiplies by 1.1; `(a:1.3)` is 1.3 regardless of nesting; `\(` is a bracket."""
    found: list[Span] = []
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    _weigh(hidden, 1.0, found, 0)
    return Read(joined([(one.replace("\0\1", ")").replace("\0\2", "("), weight) for one, weight in found]))


def _weigh(text: str, weight: float, found: list[Span], depth: int) -> None:
    for part in _outer(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")" or depth == MOST_DEPTH:
            found.append((part, weight))
            continue
        inner, own = part[1:-1], weight * 1.1
        head, colon, number = inner.rpartition(":")
        if colon and head and re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*", number):
            inner, own = head, float(number)
        _weigh(inner, own, found, depth + 1)


def _outer(text: str) -> list[str]:
    """Split a text before each outermost opening bracket and after its closing one."""
    parts, begin, level = [], 0, 0
    for place, char in enumerate(text):
        if char == "(":
            if level == 0 and place > begin:
                parts.append(text[begin:place])
                begin = place
            level += 1
        elif char == ")" and level:
            level -= 1
            if level == 0:
                parts.append(text[begin : place + 1])
                begin = place + 1
    return parts + ([text[begin:]] if begin < len(text) else [])


def without_extras(text: str) -> tuple[str, tuple[str, ...]]:
    """Remove tags such as `<lora:name:0.8>` from a prompt; return the text and the tags."""
    return EXTRA.sub("", text), tuple(found[0] for found in EXTRA.finditer(text))


def named_adapters(text: str) -> tuple[str, tuple[tuple[str, float, float | None], ...]]:
    """Remove A1111's adapter tags from a prompt; return the text and for each tag name, weight and text encoder weight.

    The text encoder weight is None if it is the same. `<lora:name>` weighs 1, `<lora:name:0.8>` 0.8, and
    `<lora:name:0.8:0.5>` 0.5, but 0.8 in the text encoders.
    """
    found = [(one[1].strip(), float(one[2] or 1), one[3]) for one in ADAPTER.finditer(text)]
    return ADAPTER.sub("", text), tuple(
        (name, float(unet or said), said if unet and float(unet) != said else None) for name, said, unet in found
    )
