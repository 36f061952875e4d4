"""The tables of docs/performance.md, from what was kept: between `<!-- results: GROUP … -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import kept, table

__all__ = ["PAGE", "fill", "write_page"]

PAGE = Path("docs") / "performance.md"
PLACE = re.compile(r"(<!-- results: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with the newest results of each group; a place none of whose groups was measured stays as it is."""

    def filled(place: re.Match[str]) -> str:
        tables = _tables(place[2].split())
        return f"{place[1]}{tables}{place[3]}" if tables else place[0]

    return PLACE.sub(filled, text)


def write_page() -> None:
    """Write the page anew."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def _tables(groups: list[str]) -> str:
    """One table for all groups that were measured at the same time and place."""
    found: dict[str, list] = {}
    for group in groups:
        if (one := kept(group)) is not None:
            found.setdefault(one[0], []).extend(one[1])
    return "".join(f"\n{where}:\n\n{table(results)}\n\n" for where, results in found.items())
