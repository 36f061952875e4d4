"""Two things timed in turn, so that a machine that drifts drifts under both."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

__all__ = ["Comparison", "alternate", "print_table"]


@dataclass(frozen=True)
class Comparison:
    """Medians of both in seconds, and the median of the ratios ours / reference of each pair of runs."""

    name: str
    ours: float
    reference: float
    ratio: float
    runs: int

    def row(self) -> tuple[str, ...]:
        """The comparison in words."""
        return self.name, _seconds(self.ours), _seconds(self.reference), f"{self.ratio:.2f}", str(self.runs)


def alternate(name: str, ours: Callable[[], object], reference: Callable[[], object], runs: int = 5) -> Comparison:
    """Run each once to warm up, then both in turn; the order within a pair changes from pair to pair."""
    ours(), reference()
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for run in range(runs):
        pair = [("ours", ours), ("reference", reference)]
        for who, call in pair if run % 2 == 0 else reversed(pair):
            gc.collect()
            began = time.perf_counter()
            call()
            times[who].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["ours"], times["reference"], strict=True)]
    return Comparison(name, median(times["ours"]), median(times["reference"]), median(ratios), runs)


def print_table(results: list[Comparison]) -> None:
    """All comparisons as a Markdown table."""
    print("| what | sfumato | reference | ratio | runs |\n|---|---|---|---|---|")
    for result in results:
        print(f"| {' | '.join(result.row())} |")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
