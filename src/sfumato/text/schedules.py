"""Prompts that change during a run, in A1111's syntax. Does not import torch."""

from __future__ import annotations

import re

__all__ = ["at_step"]

# Brackets nested deeper are plain text.
MOST_DEPTH = 30
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


def at_step(text: str, step: int, steps: int) -> str:
    """A prompt as it is read at one of its steps, counted from 1.

    `[a:b:when]` is a while step <= when, and then b: a whole number is a step, one with a point a share of the steps;
    `[b:when]` is nothing before and `[a::when]` nothing after. `[a|b]` is each in turn. All may stand within others.
    """
    return _read(text, _closed(text), (0, len(text)), (step, steps), 0)


def _read(text: str, closed: dict[int, int], within: tuple[int, int], when: tuple[int, int], depth: int) -> str:
    """What is read of a part of the text; `depth` is how many square brackets and round ones it stands in."""
    place, end = within
    # What stands before a square bracket's first mark, and then each mark with what follows it.
    parts, marks = [""], [""]
    squared = place > 0 and text[place - 1] == "[" and closed.get(place - 1) == end
    while place < end:
        char, close = text[place], closed.get(place, end)
        if char == "\\":
            parts[-1] += text[place : place + 2]
            place += 2
        elif char in "[(" and close < end and depth < MOST_DEPTH:
            found = _read(text, closed, (place + 1, close), when, depth + 1)
            parts[-1] += found if char == "[" else f"({found})"
            place = close + 1
        else:
            if squared and char in ":|":
                parts.append("")
                marks.append(char)
            else:
                parts[-1] += char
            place += 1
    return _chosen(parts, marks, *when) if squared else parts[0]


def _chosen(parts: list[str], marks: list[str], step: int, steps: int) -> str:
    """What of the parts of a pair of brackets holds at a step; all of them where it is no schedule."""
    if "|" in marks:
        turns, turn = [""], 0
        for mark, part in zip(marks, parts, strict=True):
            if mark == "|":
                turns.append("")
                turn += 1
            turns[turn] += part if mark != ":" else f":{part}"
        return turns[(step - 1) % len(turns)]
    if len(parts) in (2, 3) and NUMBER.fullmatch(parts[-1]):
        number = parts[-1].strip()
        when = min(int(float(number) * steps) if "." in number else int(number), steps)
        before, after = ("", parts[0]) if len(parts) == 2 else parts[:2]
        return before if step <= when else after
    return "[" + "".join(mark + part for mark, part in zip(marks, parts, strict=True)) + "]"


def _closed(text: str) -> dict[int, int]:
    """Where each bracket that is closed is closed."""
    found: dict[int, int] = {}
    opened: dict[str, list[int]] = {"]": [], ")": []}
    for piece in re.finditer(r"\\.|[\[\]()]", text, re.DOTALL):
        if piece[0] in "[(":
            opened[{"[": "]", "(": ")"}[piece[0]]].append(piece.start())
        elif piece[0] in opened and opened[piece[0]]:
            found[opened[piece[0]].pop()] = piece.start()
    return found
