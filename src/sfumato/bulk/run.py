"""Runs the remaining images of a job in batches, on any executor, and records each image exactly once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sfumato.bulk.extras import arrow
from sfumato.bulk.job import Picture, Shard, held
from sfumato.bulk.ledger import ATTEMPTS, Entry, Ledger, read_ledger, standing
from sfumato.bulk.painter import FATAL, Stopped, settings_of
from sfumato.bulk.shards import MOST_BYTES, SHARD, write_shard
from sfumato.errors import SfumatoError
from sfumato.values import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.bulk.job import Job
    from sfumato.bulk.painter import Painter

__all__ = ["Batch", "Drawn", "Ending", "Executor", "Outcome", "Packer", "Queue", "TooManyErrors", "here", "run"]

log = logging.getLogger("sfumato")

Batch = list[Picture]
# The result of a batch: the entries of its images, or its error.
Drawn = tuple[Batch, "list[Entry] | Exception"]
# Generates the batches that `Queue.take` returns until that is None, and yields the results.
Executor = Any
# Images that wait for others with the same settings; seconds that a batch has to finish when the run is asked to stop.
MOST_WAITING, GRACE = 2_048, 20.0


class TooManyErrors(SfumatoError):
    """So many images failed that the cause cannot be the images."""


class Ending:
    """Whether the run has been asked to stop by SIGTERM or Ctrl-C. The second signal stops it at once."""

    def __init__(self) -> None:
        self.asked: float | None = None
        self.number = 0

    def __bool__(self) -> bool:
        return self.asked is not None

    def check(self) -> None:
        """Raise `Stopped` if the time to finish has passed."""
        if self.asked is not None and time.monotonic() - self.asked > GRACE:
            raise Stopped

    @contextmanager
    def heard(self) -> Iterator[Ending]:
        """Record signals within the block instead of stopping at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            if self.asked is not None and time.monotonic() - self.asked > 1:  # some programs send it twice at once
                raise KeyboardInterrupt
            self.asked, self.number = self.asked or time.monotonic(), number

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Outcome:
    """The outcome of a run.

    pictures: images in this part of the job; before: finished before this run; done: finished by it; set_aside: keys
    with too many failed attempts; seconds: duration of the run; stopped: number of the signal that stopped it, or 0.
    """

    pictures: int = 0
    before: int = 0
    done: int = 0
    set_aside: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stopped: int = 0

    @property
    def left(self) -> int:
        """The number of images that remain for another run."""
        return self.pictures - self.before - self.done - len(self.set_aside)


class Queue:
    """The remaining images, in batches with equal settings. Failed batches come last and are split each time."""

    def __init__(self, pictures: Iterator[Picture], attempts: dict[str, int], size: Callable[[Picture], int]) -> None:
        self._pictures, self._size, self.attempts = pictures, size, attempts
        self._waiting: dict[str, Batch] = {}
        self._again: deque[Batch] = deque()
        self._count = 0

    def take(self) -> Batch | None:
        """Return the next batch; None if nothing is left at present."""
        for picture in self._pictures:
            if picture.key in self.attempts:
                self._again.append([picture])
                continue
            settings = settings_of(picture)
            batch = self._waiting.setdefault(settings, [])
            batch.append(picture)
            self._count += 1
            if len(batch) >= self._size(picture) or self._count >= MOST_WAITING:
                return self._leave(settings)
        if self._waiting:
            return self._leave(next(iter(self._waiting)))
        return self._again.popleft() if self._again else None

    def _leave(self, settings: str) -> Batch:
        batch = self._waiting.pop(settings)
        self._count -= len(batch)
        return batch

    def again(self, batch: Batch) -> None:
        """Queue a failed batch again, in two halves, so that a failing image ends up alone."""
        half = (len(batch) + 1) // 2
        self._again += [part for part in (batch[:half], batch[half:]) if part]

    def back(self, batch: Batch) -> None:
        """Queue a batch again without splitting it."""
        self._again.append(batch)


def here(painter: Painter, queue: Queue, ledger: Ledger, ending: Ending) -> Iterator[Drawn]:
    """Run the batches in this process."""
    while not ending and (batch := queue.take()) is not None:
        ledger.in_flight([one.key for one in batch])
        try:
            yield batch, painter.draw(batch, ending.check)
        except Stopped:
            break
        except FATAL:
            raise
        except Exception as error:
            yield batch, error
    ledger.in_flight([])


class Packer:
    """Moves finished images into WebDataset shards.

    An image is recorded in the ledger once it is in a shard. Until then its file waits, where the next run finds it.
    """

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self._job, self._ledger, self._number = job, ledger, 0
        self._waiting: list[tuple[Entry, str]] = []

    def add(self, batch: Batch, entries: list[Entry]) -> None:
        """Add the images of a batch. Raises `OutputError`."""
        requests = {one.key: one.request for one in batch}
        self._waiting += [(one, requests[one.key]) for one in entries]
        if len(self._waiting) >= SHARD or sum(one.bytes for one, _ in self._waiting) >= MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write a shard of the waiting images. Raises `OutputError`."""
        if not self._waiting:
            return
        job, name = self._job, f"shards/{self._ledger.worker}-{self._number:05d}.tar"
        files = ((one.key, request, job.pending(one.key).read_bytes()) for one, request in self._waiting)
        offsets = write_shard(job.folder / name, files)
        placed = [replace(one, path=f"{name}#{one.key}.png", offset=offsets[one.key]) for one, _ in self._waiting]
        self._ledger.add(placed)
        self._ledger.flush()
        for one in placed:
            job.pending(one.key).unlink(missing_ok=True)
        self._waiting, self._number = [], self._number + 1


def run(
    job: Job,
    shard: Shard,
    executor: Executor,
    size: Callable[[Picture], int],
    *,
    retry: bool = False,
    most_errors: int = 100,
    webdataset: bool = False,
    on_progress: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Generate the remaining images of a job, or of a part of it.

    size: returns the batch size for an image; retry: retry images that were set aside; most_errors: number of images
    set aside after which the run stops; webdataset: move the images into WebDataset shards. Raises `OutputError` if the
    disk is full, and `TooManyErrors`.
    """
    with held(job, shard), Ending().heard() as ending:
        ledger = Ledger(job, shard)
        suspects = _take_down_deaths(job, ledger)
        _sweep(job, shard)
        began, new, packer = time.monotonic(), 0, Packer(job, ledger)
        outcome, queue = _left(job, shard, suspects, size, retry=retry)
        try:
            for batch, drawn in executor(queue, ledger, ending):
                if isinstance(drawn, Exception):
                    new += _failed(queue, ledger, outcome, batch, drawn)
                    if new > most_errors:
                        raise TooManyErrors(
                            f"{new} images failed, the last one with: {reason(drawn)}; fix the cause and run "
                            "the command again, or raise --max-errors"
                        ) from drawn
                else:
                    packer.add(batch, drawn) if webdataset else ledger.add(drawn)
                    outcome.done += len(drawn)
                outcome.seconds = time.monotonic() - began
                on_progress(outcome)
            packer.flush()
        finally:
            ledger.flush()
        ledger.compact()
        outcome.stopped = ending.number
        return outcome


def _left(
    job: Job, shard: Shard, suspects: dict[str, int], size: Callable[[Picture], int], *, retry: bool
) -> tuple[Outcome, Queue]:
    """Return the outcome so far, and a queue of the images not in the ledger. suspects: keys to generate alone."""
    known = standing(job.folder)
    with arrow("pyarrow.parquet").ParquetFile(job.table) as file:
        keys = file.read(columns=["key"], use_threads=False)["key"].to_pylist()
    keys = [key for key in keys if shard.has(key)]
    aside = set() if retry else known.set_aside.intersection(keys)
    outcome = Outcome(len(keys), sum(key in known.done for key in keys), set_aside=sorted(aside))
    settled = known.done | aside

    def pictures() -> Iterator[Picture]:
        for picture in job.pictures_in_order():
            if shard.has(picture.key) and picture.key not in settled:
                yield picture

    return outcome, Queue(pictures(), suspects | ({} if retry else known.attempts), size)


def _failed(queue: Queue, ledger: Ledger, outcome: Outcome, batch: Batch, error: Exception) -> int:
    """Record a failure and queue the batch again. Returns the number of images that are now set aside.

    Only a batch of one image counts as a failed attempt: in larger batches, any of the images may be the cause.
    """
    if len(batch) != 1:
        queue.again(batch)
        return 0
    [picture] = batch
    attempt = queue.attempts[picture.key] = queue.attempts.get(picture.key, 0) + 1
    text = f"{type(error).__name__}: {reason(error)}"
    ledger.add([Entry(picture.key, picture.row, picture.seed, attempt=attempt, state="failed", error=text)])
    if attempt < ATTEMPTS:
        queue.back(batch)
        return 0
    outcome.set_aside.append(picture.key)
    return 1


def _take_down_deaths(job: Job, ledger: Ledger) -> dict[str, int]:
    """Return the keys that the last run was generating when it died. A single one counts as a failed attempt."""
    keys = ledger.died_on()
    if len(keys) == 1:
        attempt = standing(job.folder).attempts.get(keys[0], 0) + 1
        error = "Died: the process ended while generating this image"
        ledger.add([Entry(keys[0], 0, 0, attempt=attempt, state="failed", error=error)])
        ledger.flush()
    ledger.in_flight([])
    return dict.fromkeys(keys, 0)


def _sweep(job: Job, shard: Shard) -> None:
    """Remove shards that are not in the ledger, as their images still wait, and waiting images that are in it."""
    places = [*job.folder.glob(f"shards/{shard.label}.*.tar"), *job.folder.glob("pending/*.png")]
    if places:
        known = {part for path in read_ledger(job.folder, ["path"])["path"].to_pylist() for part in path.split("#")}
        for place in places:
            if (place.name in known) if place.suffix == ".png" else (f"shards/{place.name}" not in known):
                place.unlink(missing_ok=True)
