"""Runs one case in its own process, so that memory is measured per case: `python -m sfumato.bench.worker JSON`."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from sfumato.bench.cases import Case
from sfumato.bench.timing import Timing, peak_memory, timed
from sfumato.errors import SfumatoError

__all__ = ["Job", "Measurement", "measure"]

CALLS = 3


@dataclass(frozen=True)
class Job:
    """A case, the checkpoint folder, the number of steps to stop after (None: run all), and a conversion folder."""

    case: Case
    folder: str
    limit: int | None
    scratch: str

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Create a job from the JSON that `measure` writes."""
        values = json.loads(text)
        return cls(**values | {"case": Case(**values["case"])})


@dataclass(frozen=True)
class Measurement:
    """Seconds per image or call, and peak memory in bytes. `counted` of the `steps` were run."""

    seconds: float
    peak_bytes: int
    seconds_per_step: float | None = None
    counted: int = 1
    steps: int = 1


def measure(job: Job) -> Measurement:
    """Run a job in a new process. Raises `SfumatoError` with the error message of the process."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return Measurement(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        raise SfumatoError(
            f"{job.case.name}: the process was killed, probably because memory ran out; try a smaller --size"
        )
    sentence = (done.stderr.strip() or "no reason was given").splitlines()[-1]
    raise SfumatoError(f"{job.case.name}: {sentence}")


def _carry_out(job: Job) -> Measurement:
    if job.case.work == "picture":
        timing = _picture(job)
        pictures = job.case.count
        return Measurement(
            timing.seconds / pictures,
            peak_memory(job.case.device),
            timing.seconds_per_step / pictures,
            timing.counted,
            timing.steps,
        )
    run = timed(_call(job), job.case.device)
    return Measurement(median(run() for _ in range(CALLS)), peak_memory(job.case.device))


def _picture(job: Job) -> Timing:
    if job.case.library == "diffusers":
        from sfumato.bench.reference import picture
    else:
        from sfumato.bench.ours import picture
    draw = picture(job.case, Path(job.folder))
    draw(1)  # to warm up
    return draw(sys.maxsize if job.limit is None else job.limit)


def _call(job: Job):
    folder = Path(job.folder)
    if job.case.library == "openvino":
        from sfumato.bench import openvino

        return openvino.call(job.case, folder, Path(job.scratch))
    if job.case.library == "diffusers":
        from sfumato.bench.reference import call
    else:
        from sfumato.bench.ours import call
    return call(job.case, folder)


def _main() -> None:
    logging.disable(logging.WARNING)
    try:
        print(json.dumps(asdict(_carry_out(Job.from_json(sys.argv[1])))))
    except SfumatoError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
