"""Prompts that change during a run, in A1111's syntax. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Timeline", "at_step"]

# Brackets nested deeper are plain text.
MOST_DEPTH = 30
NUMBER = re.compile(r"\s*[+-]?(\d{1,99}\.?\d{0,99}|\.\d{1,99})\s*")


@dataclass(frozen=True)
class Timeline:
    """The steps that schedules in prompts count, in calls of the U-Net (A1111 1.6 and later).

    steps: of this pass; before: of the pass before it, if there was one: whole numbers then count both passes, and
    fractions start at 1, so 1.5 is the middle of the second pass; taken: by another checkpoint, of this pass.
    """

    steps: int
    before: int = 0
    taken: int = 0

    def when(self, number: str) -> int:
        """Return the last step of this pass, counted from 1, before a schedule changes; `number` as in the prompt."""
        if "." not in number:
            return int(number) - self.before
        return int((float(number) - (1 if self.before else 0)) * self.steps)


def at_step(text: str, step: int, timeline: Timeline) -> str:
    """Return a prompt as it is at a given step of a timeline, counted from 1 after the steps already taken.

    `[a:b:when]` is a while step <= when, then b; a whole number is a step, a decimal a fraction of all steps.
    `[b:when]` is empty before, `[a::when]` empty after. `[a|b]` alternates. All of these can be nested.
    """
    return _read(text, _closed(text), (0, len(text)), (step + timeline.taken, timeline), 0)


def _read(text: str, closed: dict[int, int], within: tuple[int, int], when: tuple[int, Timeline], depth: int) -> str:
    """Resolve a range of the text; `depth` is the number of brackets around it."""
    place, end = within
    # The text before the first separator in square brackets, then each separator and the text after it.
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


def _chosen(parts: list[str], marks: list[str], step: int, timeline: Timeline) -> str:
    """Return the part of a schedule that is active at a step; the whole text if it is not a schedule."""
    if "|" in marks:
        turns, turn = [""], 0
        for mark, part in zip(marks, parts, strict=True):
            if mark == "|":
                turns.append("")
                turn += 1
            turns[turn] += part if mark != ":" else f":{part}"
        return turns[(step - 1) % len(turns)]
    if len(parts) in (2, 3) and NUMBER.fullmatch(parts[-1]):
        before, after = ("", parts[0]) if len(parts) == 2 else parts[:2]
        return before if step <= min(timeline.when(parts[-1].strip()), timeline.steps) else after
    return "[" + "".join(mark + part for mark, part in zip(marks, parts, strict=True)) + "]"


def _closed(text: str) -> dict[int, int]:
    """Return the position of the closing bracket for each opening one that is closed."""
    found: dict[int, int] = {}
    opened: dict[str, list[int]] = {"]": [], ")": []}
    for piece in re.finditer(r"\\.|[\[\]()]", text, re.DOTALL):
        if piece[0] in "[(":
            opened[{"[": "]", "(": ")"}[piece[0]]].append(piece.start())
        elif piece[0] in opened and opened[piece[0]]:
            found[opened[piece[0]].pop()] = piece.start()
    return found
