"""How the time of a U-Net call grows with the size of the image: attention, and everything else."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.results import Result, seconds
from sfumato.bench import ours
from sfumato.bench.cases import Case, Machine
from sfumato.bench.inputs import TIMESTEP, call_inputs
from sfumato.bench.timing import alternate
from sfumato.pipelines.guidance import Guidance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sfumato.models.attention import AttentionFunction

__all__ = ["growth"]


def growth(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Compare the seconds per megapixel of both parts, at the machine's usual size and at twice that."""
    small = Case(name="", work="unet", device=machine.device, dtype=machine.half, size=machine.size)
    large = replace(small, size=2 * small.size)
    times = alternate({"small": _split(small, folder), "large": _split(large, folder)}, runs)
    names = f"{large.size}² ({small.size}²)"
    results = []
    # Attention compares every pixel with every other: four times as many make it four times as slow for each. A tenth
    # is left to noise.
    for part, what, most in ((1, "all but attention", 1.1), (0, "attention", 4.4)):
        per_pixel = [
            [one[part] / case.size**2 * 1e6 for one in times[name]]
            for name, case in (("large", large), ("small", small))
        ]
        grown = median(per_pixel[0]) / median(per_pixel[1])
        words = (seconds(median(series)) for series in per_pixel)
        results.append(Result(f"U-Net call a megapixel, {what}, {names}", *words, grown, runs, most=most))
    return results


def _split(case: Case, folder: Path) -> Callable[[], tuple[float, float]]:
    """Return a function that calls the U-Net and returns the seconds of attention and of everything else."""
    pipeline = ours.ready(case, folder)
    inputs = call_inputs(case, folder)
    guidance = Guidance(unet=pipeline.unet, conditioning=ours.conditioning(inputs, pipeline), scale=ours.SCALE)
    spent = [0.0]
    for module in pipeline.unet.attention_modules():
        module.attention = _clocked(module.attention, spent)

    @torch.no_grad()
    def run() -> tuple[float, float]:
        spent[0] = 0.0
        began = time.perf_counter()
        guidance(inputs.latents, TIMESTEP)
        return spent[0], time.perf_counter() - began - spent[0]

    run()
    return run


def _clocked(attention: AttentionFunction, spent: list[float]) -> AttentionFunction:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        began = time.perf_counter()
        out = attention(q, k, v, mask)
        spent[0] += time.perf_counter() - began
        return out

    return run
