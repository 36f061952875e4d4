"""Full-size Stable Diffusion XL: U-Net calls, and the measured and planned peak memory of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.pictures import peak_of_command, planned_and_held
from benchmarks.results import Result
from sfumato.bench import ours, reference
from sfumato.bench.cases import Case, Machine
from sfumato.bench.timing import alternate, timed
from sfumato.pipelines.sizes import read_sizes
from sfumato.runtime.choices import DTYPE_BYTES, PARTS
from sfumato.runtime.reasons import gigabytes

__all__ = ["SIDE", "memory", "peak", "unet"]

SIDE = 1024
# Size, pictures, precision ("half": the fastest that the machine has), and whether all networks stay in memory.
CASES = (
    (512, 1, "half", None),
    (512, 4, "half", None),
    (640, 2, "half", None),
    (768, 1, "half", None),
    (1024, 1, "half", None),
    (1024, 2, "half", None),
    (512, 1, "half", "none"),
    (768, 2, "half", "none"),
    (512, 1, "float32", None),
    (768, 1, "float32", None),
)


def unet(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Compare a guided call with the reference at its best in the same precision."""
    case = Case(name="", work="unet", device=machine.device, dtype=machine.half, size=SIDE)
    calls = {
        "ours": timed(ours.call(case, folder)),
        "best": timed(reference.call(replace(case, tuned=True), folder)),
    }
    times = alternate(calls, runs)
    what = f"SDXL, U-Net call, {SIDE}², {machine.half} (diffusers at its best)"
    return [Result.of_times(what, times["ours"], times["best"], 0.55)]


def peak(folder: Path, machine: Machine) -> list[Result]:
    """Measure the peak memory of `sfumato generate`, as a ratio to the weights that are in memory at the same time."""
    sizes = read_sizes(folder)
    weights = DTYPE_BYTES[machine.half] * max(getattr(sizes, part).parameters for part in PARTS)
    held = peak_of_command(folder, SIDE, 1, machine.half)
    what = f"SDXL, peak memory of a picture, {SIDE}², {machine.half} (bytes of the U-Net's {machine.half} weights)"
    return [Result(what, gigabytes(held), gigabytes(weights), held / weights, most=1.25)]


def memory(folder: Path, machine: Machine) -> Iterator[Result]:
    """Compare the planned peak with the measured one, for one step each."""
    sizes = read_sizes(folder)
    for size, count, dtype, offload in CASES:
        yield planned_and_held(folder, sizes, size, count, machine.half if dtype == "half" else dtype, offload)
