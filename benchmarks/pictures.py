"""Complete images, each in a fresh process: seconds compared with the reference, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.results import Result
from sfumato.bench.cases import DEFAULTS, TUNED, Case, Machine, guide_cases, picture_peers
from sfumato.bench.report import QUICK_STEPS
from sfumato.bench.timing import alternate
from sfumato.bench.worker import Job, Measurement, measure
from sfumato.pipelines.sizes import read_sizes
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import DTYPE_BYTES, PARTS, Sizes, Wishes
from sfumato.runtime.facts import read_facts
from sfumato.runtime.plan import plan
from sfumato.runtime.reasons import gigabytes

__all__ = ["memory", "peak", "peak_of_command", "pictures", "planned_and_held"]

STEPS = 50
SIZES, COUNTS, DTYPES = (256, 384, 512, 640, 768), (1, 2, 4), ("float32", "bfloat16")

# The command line in this process, and then what it held at most.
COMMAND = """
import json, sys
from sfumato.bench.timing import peak_memory
from sfumato.cli.main import main
sys.argv = ["sfumato", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print(peak_memory())
"""


def pictures(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Ours by its defaults, with 20 steps, against the reference at its best (20 steps) and its defaults (50).

    The first steps are measured and the others reckoned from them, for everyone alike.
    """
    *_, better, _ = guide_cases(machine, STEPS)
    results = alternate({case.name: _measured(case, folder) for case in [better, *picture_peers(machine, STEPS)]}, runs)
    times = {name: [one.seconds for one in measured] for name, measured in results.items()}
    name = f"picture, {machine.size}², {better.steps} steps of {better.scheduler}, {QUICK_STEPS} of them measured"
    ours, best, default = times[better.name], times[f"diffusers, {TUNED}"], times[f"diffusers, {DEFAULTS}"]
    return [
        Result.of_times(f"{name} (diffusers at its best, the same steps)", ours, best, 0.5),
        Result.of_times(f"{name} (diffusers' defaults, {STEPS} steps)", ours, default, 0.12),
    ]


def _measured(case: Case, folder: Path) -> Callable[[], Measurement]:
    return lambda: measure(Job(case, str(folder), QUICK_STEPS, ""))


def peak(folder: Path, machine: Machine) -> list[Result]:
    """Measure the peak memory of `sfumato generate` for one image, as a ratio to the bytes of the weights."""
    weights = DTYPE_BYTES[machine.half] * sum(getattr(read_sizes(folder), part).parameters for part in PARTS)
    held = peak_of_command(folder, machine.size, 1, machine.half)
    what = f"peak memory of a picture, {machine.size}², {machine.half} (bytes of the {machine.half} weights)"
    return [Result(what, gigabytes(held), gigabytes(weights), held / weights, most=1.25)]


def memory(folder: Path) -> Iterator[Result]:
    """Compare the planned peak with the measured one of `sfumato generate`, for one step each."""
    sizes = read_sizes(folder)
    for dtype in DTYPES:
        for size in SIZES:
            for count in COUNTS:
                yield planned_and_held(folder, sizes, size, count, dtype)


def planned_and_held(
    folder: Path, sizes: Sizes, size: int, count: int, dtype: str, offload: str | None = None, *, light: bool = False
) -> Result:
    """Compare the planned peak of one step with the measured one. offload: used by both; light: 8-bit weights."""
    request = GenerateRequest(prompt="a fox", width=size, height=size, count=count, steps=1)
    wishes = Wishes(device="cpu", dtype=dtype, offload=offload, eight_bit=light, once=True)
    planned = plan(read_facts("cpu"), sizes, request, wishes).peak_bytes
    more = () if offload is None else ("--offload", offload)
    held = peak_of_command(folder, size, count, dtype, *more, *(("--eight-bit",) if light else ()))
    how = ", 8 bits" if light else ""
    how += "" if offload is None else ", all networks in memory" if offload == "none" else f", {offload}"
    what = f"planned peak, {count} of {size}², {dtype}{how} (measured)"
    return Result(what, gigabytes(planned), gigabytes(held), planned / held, least=0.9, most=1.1)


def peak_of_command(folder: Path, size: int, count: int, dtype: str, *more: str) -> int:
    """Return the peak memory in bytes of `sfumato generate` for one step. more: further command-line arguments."""
    words = ["generate", "a fox", "--model", folder.resolve(), "--width", size, "--height", size, "--count", count]
    words += ["--dtype", dtype, "--device", "cpu", "--steps", 1, "--quiet", *more]
    with tempfile.TemporaryDirectory(prefix="sfumato-benchmarks-") as place:
        arguments = json.dumps([str(word) for word in words])
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, arguments], cwd=place, check=True, stdout=subprocess.PIPE, text=True
        )
    return int(done.stdout.splitlines()[-1])
