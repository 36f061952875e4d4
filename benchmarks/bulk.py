"""Bulk jobs: a million rows that are not drawn (planning, ledger, status), and speed compared with `generate`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Result, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.bulk.ledger import Ledger
    from sfumato.bulk.run import Drawn, Ending, Queue

__all__ = ["bulk"]

ROWS = 1_000_000
# Images of a run whose rate is measured, and the share of the rate of `sfumato generate --count` that is wanted.
IMAGES, LEAST = 48, 0.9
COMMAND = [sys.executable, "-c", "from sfumato.cli.main import main; main()"]
LOAD = "from sfumato.bulk.painter import Work; work = Work(sys.argv[2], 'built-in', 'built-in'); "
# Each in a process of its own, as a command would be; the last line is what it took and its largest memory.
TIMED = "import resource, sys, time; from pathlib import Path; {before}; began = time.perf_counter(); {work}; \
print(time.process_time(), time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
PLAN = (
    "from sfumato.bulk.planning import open_job; " + LOAD + "pipeline = work.load()",
    "open_job(Path(sys.argv[2]), Path(sys.argv[1]), pipeline, on_bad=print)",
)
RUN = (
    "import benchmarks.bulk; from sfumato.bulk.job import Job, Shard; from sfumato.bulk.run import run",
    "run(Job.read(Path(sys.argv[2])), Shard(), benchmarks.bulk.nobody, lambda _: 1000)",
)
OPEN = ("from sfumato.bulk.ledger import standing", "assert len(standing(Path(sys.argv[2])).done) > 0")
STATUS = ("from sfumato.bulk.report import status", "assert status(Path(sys.argv[2]))['left'] == 0")


def bulk(rows: int = ROWS) -> list[Result]:
    """Measure planning, a run whose executor draws nothing, opening the ledger, and the status."""
    with tempfile.TemporaryDirectory() as folder:
        source, job = Path(folder) / "rows.jsonl", Path(folder) / "job"
        with source.open("w") as file:
            for number in range(rows):
                row = {"prompt": f"a red apple and {number} stars, oil on canvas", "steps": 20 + number % 3}
                file.write(json.dumps(row) + "\n")
        results, words = [], f"of {rows:,} rows"
        for what, code, target in (
            (f"plan {words}", PLAN, 60.0),
            (f"run {words} that draws nothing", RUN, None),
            (f"open the ledger {words}", OPEN, 5.0),
            (f"status {words}", STATUS, 1.0),
        ):
            took, memory = _timed(code, source, job)
            if target is not None:
                results.append(Result(f"{what} (limit)", seconds(took), seconds(target), took / target, 1, most=1))
                what = f"{what}: peak memory (limit)"
                results.append(Result(what, f"{memory / 1e9:.2f} GB", "1.00 GB", memory / 1e9, 1, most=1))
            print(what, f"{took:.2f} s, {memory / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return [*results, rate()]


def rate(runs: int = 2, images: int = IMAGES) -> Result:
    """Return the seconds of a bulk job and of `sfumato generate --count` for the same images, including the start."""
    ours, theirs = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        row = {"prompt": "a red apple, 3d", "steps": 4, "seed": 1, "count": images}
        rows.write_text(json.dumps(row) + "\n")
        words = ["generate", row["prompt"], "--steps", "4", "--seed", "1", "--count", str(images), "--quiet"]
        for number in range(runs):
            for times, command in (
                (theirs, [*words, "--output", f"{folder}/alone{number}/"]),
                (ours, ["bulk", "run", str(rows), "--output", f"{folder}/job{number}", "--quiet"]),
            ):
                began = time.perf_counter()
                subprocess.run([*COMMAND, *command], cwd=folder, check=True, capture_output=True)
                times.append(time.perf_counter() - began)
    what = f"{images} images beside `generate --count` (limit: {LEAST:.0%} of its rate)"
    return Result.of_times(what, ours, theirs, most=round(1 / LEAST, 2))


def _timed(code: tuple[str, str], source: Path, job: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", TIMED.format(before=code[0], work=code[1]), str(source), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    processor, took, memory = map(float, done.stdout.split()[-3:])
    print(f"{processor:.2f} s of processor time, start included", file=sys.stderr)
    return took, memory


def nobody(queue: Queue, ledger: Ledger, ending: Ending) -> Iterator[Drawn]:
    """An executor that reports every image as drawn."""
    from sfumato.bulk.ledger import Entry

    while (batch := queue.take()) is not None:
        yield (
            batch,
            [
                Entry(
                    one.key, one.row, one.seed, f"{one.key}.png", hashlib.sha256(one.key.encode()).hexdigest(), 1, 0.1
                )
                for one in batch
            ],
        )


if __name__ == "__main__":
    for one in bulk(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS):
        print(one)
