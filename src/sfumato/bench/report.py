"""The whole benchmark: all cases in alternating rounds, and their summary."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from sfumato.bench.cases import BATCH, DEFAULTS, TUNED, Case, Machine, call_cases, guide_cases, picture_peers
from sfumato.bench.timing import alternate, ratio
from sfumato.bench.worker import Job, Measurement, measure
from sfumato.errors import MissingExtra, OutputError, UsageError, suggest

__all__ = ["PEERS", "QUICK_STEPS", "Report", "Row", "Setting", "check_peers", "run"]

# Libraries to compare with, and the packages each of them needs.
PEERS = {"diffusers": ("diffusers", "transformers", "accelerate"), "openvino": ("openvino",)}
# With --quick, the first step and three more.
QUICK_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to measure: a checkpoint folder on a machine, with `steps` in the first rows, each `runs` times.

    Raises `UsageError` for fewer than one step or run, and the errors of `check_peers`.
    """

    folder: str
    machine: Machine
    steps: int = 50
    runs: int = 3
    peers: tuple[str, ...] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "runs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_peers(self.peers, self.machine.device)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the runs of one case.

    seconds, seconds_per_step   of one image, or of one call
    ratio                       to the first row: the median of the ratios within each round
    counted, steps              steps that were run, and steps that the seconds stand for
    """

    name: str
    library: str
    seconds: float
    seconds_per_step: float | None
    peak_bytes: int
    ratio: float
    runs: int
    counted: int
    steps: int


@dataclass(frozen=True)
class Report:
    """Rows of whole images and, if there are peers, of single calls; `notes` explain how to read them."""

    pictures: tuple[Row, ...]
    unet: tuple[Row, ...]
    vae: tuple[Row, ...]
    notes: tuple[str, ...]


def check_peers(peers: Sequence[str], device: str) -> None:
    """Raise `UsageError` if a peer is unknown or cannot run here, `MissingExtra` if one is not installed."""
    for peer in peers:
        if peer not in PEERS:
            raise UsageError(f"there is no peer {peer!r}{suggest(peer, PEERS)}; --peers takes {', '.join(PEERS)}")
        if any(find_spec(package) is None for package in PEERS[peer]):
            raise MissingExtra(f"{peer} is not installed; run 'pip install {' '.join(PEERS[peer])}'")
        if peer == "openvino" and device != "cpu":
            raise UsageError(
                f"openvino is only measured on a CPU, but this machine has {device}; remove it from --peers"
            )


def run(setting: Setting, watch: Callable[[str], AbstractContextManager[None]]) -> Report:
    """Measure all cases; `watch` is called with a description of each measurement and wraps it.

    Raises `OutputError` if no temporary folder can be created.
    """
    machine = setting.machine
    cases = guide_cases(machine, setting.steps)
    if "diffusers" in setting.peers:
        cases += picture_peers(machine, setting.steps)
    try:
        folder = tempfile.TemporaryDirectory(prefix="sfumato-bench-")
    except OSError as error:
        why = error.strerror or error
        raise OutputError(
            f"cannot create a folder for temporary files ({why}); set TMPDIR to a writable folder"
        ) from error
    with folder as scratch:
        pictures = _rows(setting, cases, scratch, watch)
        calls = {
            work: _rows(setting, call_cases(machine, work, setting.peers), scratch, watch) if setting.peers else ()
            for work in ("unet", "vae")
        }
    return Report(pictures, **calls, notes=tuple(_notes(setting, pictures)))


def _rows(
    setting: Setting, cases: list[Case], scratch: str, watch: Callable[[str], AbstractContextManager[None]]
) -> tuple[Row, ...]:
    limit = QUICK_STEPS if setting.quick else None

    def job(case: Case) -> Callable[[], Measurement]:
        def carry_out() -> Measurement:
            with watch(f"{case.work}: {case.name}"):
                return measure(Job(case, setting.folder, limit, scratch))

        return carry_out

    results = alternate({case.name: job(case) for case in cases}, setting.runs)
    first = [result.seconds for result in results[cases[0].name]]
    return tuple(_row(case, results[case.name], first) for case in cases)


def _row(case: Case, results: list[Measurement], first: list[float]) -> Row:
    seconds = [result.seconds for result in results]
    steps = [result.seconds_per_step for result in results if result.seconds_per_step is not None]
    return Row(
        name=case.name,
        library=case.library,
        seconds=median(seconds),
        seconds_per_step=median(steps) if steps else None,
        peak_bytes=round(median(result.peak_bytes for result in results)),
        ratio=ratio(seconds, first),
        runs=len(results),
        counted=results[0].counted,
        steps=results[0].steps,
    )


def _notes(setting: Setting, pictures: Sequence[Row]) -> list[str]:
    machine = setting.machine
    notes = [f"{_times(setting.runs)} each, alternating, in a new process after a warm-up; medians are shown"]
    if any(row.counted < row.steps for row in pictures):
        notes.append(f"the first {QUICK_STEPS} steps were timed, and the rest was extrapolated (--quick)")
    if machine.half == "float32":
        notes.append("this CPU has no native half precision, so that row is omitted and the others use float32")
    fast = next(row for row in reversed(pictures) if row.library == "sfumato" and not row.name.startswith(f"{BATCH} "))
    for how in (DEFAULTS, TUNED):
        peer = next((row for row in pictures if row.name == f"diffusers, {how}"), None)
        if peer is not None:
            notes.append(f"{fast.name} takes {fast.seconds / peer.seconds:.2f} times as long as {peer.name}")
    return notes


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
