"""What every step of the recipe shares: the budget table, the work folder, seeds, pauses and atomic files."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import signal
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
# The option of steps that train.
MINUTES = {"--minutes": {"type": float, "default": 0.0, "help": "stop (resumable) after so many minutes"}}


class RecipeError(SystemExit):
    """One sentence for the person at the terminal; ends the step with status 1."""

    def __init__(self, sentence: str):
        super().__init__(f"mini: {sentence}")


def budget(name: str) -> SimpleNamespace:
    """Row `name` of budgets.toml; every key of `[default]` it does not name keeps the default."""
    table = tomllib.loads((HERE / "budgets.toml").read_text())
    if name not in table or name == "default":
        rows = ", ".join(key for key in table if key != "default")
        raise RecipeError(f"there is no budget {name!r}; choose one of {rows}.")
    unknown = set(table[name]) - set(table["default"])
    if unknown:
        raise RecipeError(f"budgets.toml: [{name}] has unknown keys {sorted(unknown)}.")
    return SimpleNamespace(name=name, until=0.0, **{**table["default"], **table[name]})


def seconds_of(row: SimpleNamespace, seconds: float) -> float:
    """A step's seconds: the budget's, or what is left until `row.until` (as `time.time` counts) where that is less."""
    left = max(row.until - time.time(), 1.0) if row.until else math.inf
    return min(seconds, left) if seconds else seconds


@functools.cache
def words() -> dict[str, Any]:
    """`words.toml`: styles, colours, sizes and relations as captions name them, and what is never drawn."""
    return tomllib.loads((HERE / "words.toml").read_text())


def arguments(doc: str | None, extra: dict[str, dict[str, Any]] | None = None) -> tuple[argparse.Namespace, Any, Path]:
    """Parse the options every step has (plus `extra`), and return them with the budget and the work folder."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--budget", default=os.environ.get("BUDGET", "tiny"), help="a row of budgets.toml")
    parser.add_argument("--work", default=os.environ.get("WORK", ""), help="where downloads and checkpoints go")
    parser.add_argument("--downloads", default=os.environ.get("DOWNLOADS", ""), help="default: WORK/../downloads")
    for flag, options in (extra or {}).items():
        parser.add_argument(flag, **options)
    args = parser.parse_args()
    row = budget(args.budget)
    work = Path(args.work or HERE / "work" / args.budget).resolve()
    work.mkdir(parents=True, exist_ok=True)
    args.downloads = Path(args.downloads or work.parent / "downloads").resolve()
    return args, row, work


def trained(doc: str | None, name: str, train: Callable[[Any, Path, Log, float], None]) -> None:
    """Run a step that trains: `train(row, work, log, minutes)` with the options it has, logging to WORK/NAME.log."""
    args, row, work = arguments(doc, MINUTES)
    train(row, work, Log(work / f"{name}.log"), args.minutes)


def set_up_torch(seed: int, threads: int) -> Any:
    """Seed everything and return the device. `threads` 0 leaves torch's own choice."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda")
    return torch.device("cpu")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a neighbour of `path` and rename it at the end, so that a killed step leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)


def save(path: Path, state: Any) -> None:
    """`torch.save`, atomically."""
    import torch

    with atomic(path) as partial:
        torch.save(state, partial)


def load(path: Path) -> Any:
    """Read a checkpoint of this recipe on the CPU."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def need(path: Path, step: str) -> Path:
    """Return `path`, or say which step makes it."""
    if not path.exists():
        raise RecipeError(f"{path} is missing; run {step} first.")
    return path


def save_arrays(path: Path, *, compress: bool = True, **arrays: Any) -> None:
    """An npz, atomically."""
    import numpy as np

    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    with atomic(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def save_json(path: Path, value: Any) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


class Log:
    """Lines on the terminal and in WORK/<step>.log."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, line: str) -> None:
        """Say one line."""
        stamped = f"{time.strftime('%H:%M:%S')} {line}"
        print(stamped, flush=True)
        with self.path.open("a") as file:
            file.write(stamped + "\n")


class Clock:
    """Training time that survives restarts and stands still while a PAUSE file exists.

    `stopped` turns true on SIGTERM or Ctrl-C: a loop that looks at it ends after its step and writes its checkpoint.
    """

    def __init__(self, work: Path, spent: float = 0.0):
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self.flags = [work / "PAUSE", work.parent / "PAUSE"]
        self.spent = spent
        self.last = time.monotonic()

    def _stop(self, number: int, frame: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def tick(self) -> float:
        """Seconds trained so far, this run and those before it."""
        now = time.monotonic()
        self.spent += now - self.last
        self.last = now
        return self.spent

    def paused(self) -> bool:
        """Whether WORK/PAUSE or WORK/../PAUSE exists."""
        return any(flag.exists() for flag in self.flags)

    def wait_while_paused(self) -> None:
        """Sleep as long as that is so, off the clock."""
        self.tick()
        while self.paused() and not self.stopped:
            time.sleep(2)
        self.last = time.monotonic()
