"""A benchmark report as an SVG bar chart."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.bench.report import Row

__all__ = ["bars"]

WIDTH, LINE, LABELS, NUMBERS = 760, 30, 240, 90
COLOURS = {"sfumato": "#b5651d", "diffusers": "#9aa3ab", "openvino": "#6f8fa8"}


def bars(title: str, rows: Sequence[Row]) -> str:
    """Return an SVG of horizontal bars, one per row's seconds, under a title."""
    longest = max(row.seconds for row in rows)
    height = LINE * (len(rows) + 1) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for number, row in enumerate(rows, start=1):
        top = LINE * number + 6
        length = max(1.0, (WIDTH - LABELS - NUMBERS) * row.seconds / longest)
        parts += [
            f'<text x="{LABELS - 10}" y="{top + 18}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect x="{LABELS}" y="{top + 4}" width="{length:.1f}" height="{LINE - 10}"'
            f' fill="{COLOURS[row.library]}"/>',
            f'<text x="{LABELS + length + 8:.1f}" y="{top + 18}">{row.seconds:.3g} s</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
