"""Results of benchmarks: rows of a table, stored in a file from which the page is written."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch

from sfumato.bench.timing import ratio
from sfumato.files import write_json
from sfumato.runtime.facts import read_facts

__all__ = ["KEPT", "Result", "keep", "kept", "seconds", "table"]

KEPT = Path("out") / "benchmarks.json"


@dataclass(frozen=True)
class Result:
    """One row: both values as text, their ratio (ours / theirs), and the bounds of its target."""

    what: str
    ours: str
    theirs: str
    ratio: float
    runs: int = 1
    least: float | None = None
    most: float | None = None

    @classmethod
    def of_times(cls, what: str, ours: list[float], theirs: list[float], most: float | None = None) -> Result:
        """Return a row with the medians of alternated runs and the median of their pairwise ratios."""
        return cls(what, seconds(median(ours)), seconds(median(theirs)), ratio(ours, theirs), len(ours), most=most)

    @property
    def target(self) -> str:
        """The target as text, with a remark if it was missed."""
        if self.most is None:
            return ""
        words = f"≤ {self.most:g}" if self.least is None else f"{self.least:g} to {self.most:g}"
        missed = self.ratio > self.most or (self.least is not None and self.ratio < self.least)
        return f"{words}, missed" if missed else words


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| what | sfumato | compared with | ratio | target | runs |", "|---|---|---|---|---|---|"]
    for one in results:
        lines.append(f"| {one.what} | {one.ours} | {one.theirs} | {one.ratio:.2f} | {one.target} | {one.runs} |")
    return "\n".join(lines)


def keep(group: str, results: list[Result]) -> None:
    """Store the results of a group, replacing earlier ones."""
    KEPT.parent.mkdir(exist_ok=True)
    rows = [dataclasses.asdict(result) for result in results]
    write_json(KEPT, _read() | {group: {"date": str(date.today()), "machine": _machine(), "rows": rows}})


def kept(group: str) -> tuple[str, list[Result]] | None:
    """Return when and where a group was last measured, as text, and its results, or None."""
    found = _read().get(group)
    if found is None:
        return None
    return f"{found['date']}, {found['machine']}", [Result(**row) for row in found["rows"]]


def seconds(value: float) -> str:
    """Return a time as text."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def _read() -> dict:
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}


def _machine() -> str:
    facts = read_facts()
    instructions = f" ({', '.join(facts.instructions)})" if facts.instructions else ""
    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    return (
        f"{facts.processor}{instructions}, {threads} threads, {facts.memory_total / 1e9:.0f} GB,"
        f" Python {facts.python}, torch {torch.__version__}"
    )
