"""Alternated timing, so that a machine that slows down slows down every candidate."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

__all__ = ["Clock", "Timing", "alternate", "peak_memory", "ratio", "synchronize", "timed"]

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds per image and per step; `counted` of the `steps` were run, the rest is extrapolated."""

    seconds: float
    seconds_per_step: float
    counted: int
    steps: int


class Clock:
    """Times one image: starts when created, records the first and the last step, and then the end.

    limit: stop after this many steps; each remaining step is assumed to take the average time after the first one.
    """

    def __init__(self, device: str, limit: int) -> None:
        self.device, self.limit = device, limit
        self._steps: list[float] = []
        self._counted = self._total = 0
        self._began = self._now()

    def step(self, number: int, total: int) -> bool:
        """Record a finished step, counted from 1; returns whether it was the last one to run."""
        last = min(self.limit, total)
        if number in (1, last):
            self._steps.append(self._now())
            self._counted, self._total = number, total
        return number >= last

    def stop(self) -> Timing:
        """Return the timing at the end of the image."""
        ended = self._now()
        first, last = self._steps[0], self._steps[-1]
        a_step = (last - first) / (self._counted - 1) if self._counted > 1 else first - self._began
        left_out = (self._total - self._counted) * a_step
        return Timing(ended - self._began + left_out, a_step, self._counted, self._total)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def synchronize(device: str) -> None:
    """Wait until a device has finished its queued work."""
    if device != "cpu":
        import torch

        {"cuda": torch.cuda, "mps": torch.mps}[device].synchronize()


def alternate(calls: Mapping[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """Return the results of each call over all runs; the order is reversed after each run."""
    results: dict[str, list[T]] = {name: [] for name in calls}
    for run in range(runs):
        for name in calls if run % 2 == 0 else reversed(list(calls)):
            results[name].append(calls[name]())
    return results


def timed(call: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    """Return a function that returns the seconds a call takes; the call is made once first, to warm up."""
    call()

    def run() -> float:
        gc.collect()
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - began

    return run


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the pairwise ratios."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_memory(device: str = "cpu") -> int:
    """Return the peak memory of this process in bytes: device memory on CUDA, system memory elsewhere."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        # getrusage() starts from the parent's memory; this counts this program only.
        with open("/proc/self/status", encoding="ascii") as stream:
            line = next(line for line in stream if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except FileNotFoundError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
