"""Tables of docs/performance.md, made from stored results: between `<!-- results: GROUP … -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import kept, table

__all__ = ["PAGE", "fill", "write_page"]

PAGE = Path("docs") / "performance.md"
PLACE = re.compile(r"(<!-- results: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return the text with the newest results of each group. Tables without any measured group stay unchanged."""

    def filled(place: re.Match[str]) -> str:
        tables = _tables(place[2].split())
        return f"{place[1]}{tables}{place[3]}" if tables else place[0]

    return PLACE.sub(filled, text)


def write_page() -> None:
    """Update the page."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def _tables(groups: list[str]) -> str:
    """Return one table for all groups that were measured on the same day and machine."""
    found: dict[str, list] = {}
    for group in groups:
        if (one := kept(group)) is not None:
            found.setdefault(one[0], []).extend(one[1])
    return "".join(f"\n{where}:\n\n{table(results)}\n\n" for where, results in found.items())
