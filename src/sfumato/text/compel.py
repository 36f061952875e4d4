"""Weighted prompts in the syntax of compel and InvokeAI. Does not import torch."""

from __future__ import annotations

import re

from sfumato.text.grammars import MOST_DEPTH, Read, Span, joined

__all__ = ["compel"]

# Each plus multiplies the weight by 1.1, each minus by 0.9.
PLUS, MINUS = 1.1, 0.9
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# A word. Signs followed by other characters belong to it, as in "well-known".
WORD = re.compile(r'(?:\\.|[^\s\\()",.+=-]|[+-](?![\s()",.+=-]|$))+')
SIGNS = re.compile(r"\++|-+")
WEIGHT = re.compile(rf"\++(?!\d)|-+(?!\d)|{NUMBER}")
ATTEND = re.compile(rf"\.attend\(\s*(\++|-+|{NUMBER})\s*\)")
SWAP = re.compile(r"\.swap\(")
JOINED = re.compile(r"\.(blend|and|add)\(([^()]*)\)\s*$")
LORA = re.compile(r"\b(?:withLora|useLora)\([^()]{0,200}\)")


def compel(text: str) -> Read:
    r"""Parse compel's syntax: `word+` is 1.1, `word--` 0.9 · 0.9, `(a b)1.2` or `"a b"1.2` 1.2; they can be nested.

    `("a", "b").blend(1, 0.8)` mixes prompts, `("a", "b").and(1, 0.5)` concatenates them. A backslash escapes a sign or
    bracket. An unclosed bracket is plain text and gives a note.
    """
    notes = [f"{found[0]} in the prompt is ignored; load adapters with --lora" for found in LORA.finditer(text)]
    text = LORA.sub("", text)
    whole = text.strip()
    close = _closing(whole, 0) if whole.startswith("(") else None
    found = None if close is None else JOINED.match(whole, close + 1)
    if close is None or found is None:
        spans = _spans(text, 1.0, notes, 0)
        return Read(joined(spans), tuple(dict.fromkeys(notes)))
    items = [joined(_spans(one, 1.0, notes, 1)) for one in _items(whole[1:close])]
    weights, normalized = _weights(found[2], len(items), notes)
    parts = tuple((Read(spans), weight) for spans, weight in zip(items, weights, strict=True))
    how = "and" if found[1] != "blend" else "blend" if normalized else "sum"
    return Read(tuple(span for spans in items for span in spans), tuple(dict.fromkeys(notes)), parts, how)


def _weights(text: str, count: int, notes: list[str]) -> tuple[list[float], bool]:
    """Parse the weights of combined prompts, by default 1, and whether to normalize their sum to 1."""
    said = [one.strip() for one in text.split(",") if one.strip()]
    normalized = "no_normalize" not in said
    said = [one for one in said if one != "no_normalize"]
    if len(said) not in (0, count) or not all(re.fullmatch(NUMBER, one) for one in said):
        notes.append(f"({text}) does not give {count} weights for {count} prompts; each has the weight 1")
        said = []
    return [float(one) for one in said] or [1.0] * count, normalized


def _items(text: str) -> list[str]:
    """Split at commas outside brackets and quotes, and strip whitespace."""
    items, begin, place = [], 0, 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1
        elif char in '("':
            place = _closing(text, place) or place
        elif char == ",":
            items.append(text[begin:place])
            begin = place + 1
        place += 1
    return [one.strip() for one in (*items, text[begin:])]


def _closing(text: str, place: int) -> int | None:
    """Return the position of the closing bracket or quote; None if it is not closed."""
    if text[place] == '"':
        found = re.compile(r'(?:\\.|[^"\\])*"', re.DOTALL).match(text, place + 1)
        return found and found.end() - 1
    level, quoted = 0, False
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1
        elif char == '"':
            quoted = not quoted
        elif not quoted and char in "()":
            level += 1 if char == "(" else -1
            if level == 0:
                return place
        place += 1
    return None


def _spans(text: str, weight: float, notes: list[str], depth: int) -> list[Span]:
    """Parse a text into spans, multiplying their weights by `weight`."""
    found: list[Span] = []
    place = 0
    while place < len(text):
        char = text[place]
        close = _closing(text, place) if char in '("' and depth < MOST_DEPTH else None
        if close is not None:
            factor, end = _operator(text, close + 1, WEIGHT, notes)
            found += _spans(text[place + 1 : close], weight * factor, notes, depth + 1)
            place = end
        elif word := WORD.match(text, place):
            factor, place = _operator(text, word.end(), SIGNS, notes)
            found.append((re.sub(r"\\(.)", r"\1", word[0]), weight * factor))
        else:
            if char == "(":
                notes.append(f"an unclosed bracket is read as plain text: {text[:80]!r}")
            # A space between two words of the same weight does not start a new span.
            found.append((char, found[-1][1] if found and char.isspace() else weight))
            place += 1
    return found


def _operator(text: str, place: int, signs: re.Pattern[str], notes: list[str]) -> tuple[float, int]:
    """Parse the weight after a word or bracket; return the factor (1 without a weight) and the position after it."""
    if swap := SWAP.match(text, place):
        close = _closing(text, swap.end() - 1)
        if close is not None:
            notes.append(f"{text[swap.start() : close + 1]} in the prompt is ignored; the words before it are used")
            return 1.0, close + 1
    found = ATTEND.match(text, place) or signs.match(text, place)
    if found is None:
        return 1.0, place
    said = found[1] if found.re is ATTEND else found[0]
    if set(said) <= {"+"} or set(said) <= {"-"}:
        return (PLUS if said[0] == "+" else MINUS) ** len(said), found.end()
    return float(said), found.end()
