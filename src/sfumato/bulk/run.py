"""Runs what is left of a job in batches, on any executor, and settles every image exactly once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.bulk.extras import arrow
from sfumato.bulk.job import Picture, Shard, held
from sfumato.bulk.ledger import ATTEMPTS, Entry, Ledger, read_ledger, standing
from sfumato.bulk.painter import Stopped, settings_of
from sfumato.errors import OutputError, SfumatoError
from sfumato.values import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.bulk.job import Job
    from sfumato.bulk.painter import Painter

__all__ = ["Batch", "Drawn", "Ending", "Executor", "Outcome", "Queue", "TooManyErrors", "here", "run"]

log = logging.getLogger("sfumato")

Batch = list[Picture]
# What became of a batch: the entries that are settled now, or what went wrong with it.
Drawn = tuple[Batch, "list[Entry] | Exception"]
# Draws what `Queue.take` gives until that is None, and yields what became of it.
Executor = Any
# Pictures that wait for others of their settings, and seconds that a batch gets to end when the end is asked for.
MOST_WAITING, GRACE = 2_048, 20.0


class TooManyErrors(SfumatoError):
    """So many pictures failed that something else than these pictures is wrong."""


class Ending:
    """Whether somebody has asked for the end: SIGTERM, or Ctrl-C once. A second time ends at once."""

    def __init__(self) -> None:
        self.asked: float | None = None
        self.number = 0

    def __bool__(self) -> bool:
        return self.asked is not None

    def check(self) -> None:
        """Raise `Stopped` where the end was asked for a while ago."""
        if self.asked is not None and time.monotonic() - self.asked > GRACE:
            raise Stopped

    @contextmanager
    def heard(self) -> Iterator[Ending]:
        """Within the block signals are noted, and not met at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            if self.asked is not None and time.monotonic() - self.asked > 1:  # some ask twice at once
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
    """How a run ended: pictures of this part of the job in all, done before and now, set aside; who stopped it."""

    pictures: int = 0
    before: int = 0
    done: int = 0
    set_aside: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stopped: int = 0

    @property
    def left(self) -> int:
        """Pictures that another run would draw."""
        return self.pictures - self.before - self.done - len(self.set_aside)


class Queue:
    """What is left to draw, in batches of equal settings; what failed comes last, each picture alone."""

    def __init__(self, pictures: Iterator[Picture], attempts: dict[str, int], size: Callable[[Picture], int]) -> None:
        self._pictures, self._size, self.attempts = pictures, size, attempts
        self._waiting: dict[str, Batch] = {}
        self._again: deque[Picture] = deque()
        self._count = 0

    def take(self) -> Batch | None:
        """The next batch; None if nothing is left, as far as is known now."""
        for picture in self._pictures:
            if picture.key in self.attempts:
                self._again.append(picture)
                continue
            settings = settings_of(picture)
            batch = self._waiting.setdefault(settings, [])
            batch.append(picture)
            self._count += 1
            if len(batch) >= self._size(picture) or self._count >= MOST_WAITING:
                return self._leave(settings)
        if self._waiting:
            return self._leave(next(iter(self._waiting)))
        return [self._again.popleft()] if self._again else None

    def _leave(self, settings: str) -> Batch:
        batch = self._waiting.pop(settings)
        self._count -= len(batch)
        return batch

    def again(self, batch: Batch) -> None:
        """Draw these once more, later, each alone."""
        self._again.extend(batch)


def here(painter: Painter, queue: Queue, ledger: Ledger, ending: Ending) -> Iterator[Drawn]:
    """The executor that is this process."""
    while not ending and (batch := queue.take()) is not None:
        ledger.in_flight([one.key for one in batch])
        try:
            yield batch, painter.draw(batch, ending.check)
        except Stopped:
            break
        except OutputError:  # a full disk is no picture's fault
            raise
        except Exception as error:
            yield batch, error
    yield [], painter.finish()
    ledger.in_flight([])


def run(
    job: Job,
    shard: Shard,
    executor: Callable[[Queue, Ledger, Ending], Iterator[Drawn]],
    size: Callable[[Picture], int],
    *,
    retry: bool = False,
    most_errors: int = 100,
    on_progress: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Draw what is left of a job, or of a part of it. Raises `OutputError` for a full disk and `TooManyErrors`.

    size: pictures of a batch; retry: try again what was set aside; most_errors: pictures set aside before it stops.
    """
    with held(job, shard), Ending().heard() as ending:
        ledger = Ledger(job, shard)
        _take_down_deaths(job, ledger)
        _sweep_shards(job, shard)
        begun = time.monotonic()
        outcome, queue = _left(job, shard, size, retry=retry)
        new = 0
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
                    ledger.add(drawn)
                    outcome.done += len(drawn)
                outcome.seconds = time.monotonic() - begun
                on_progress(outcome)
        finally:
            ledger.flush()
        ledger.compact()
        outcome.stopped = ending.number
        return outcome


def _left(job: Job, shard: Shard, size: Callable[[Picture], int], *, retry: bool) -> tuple[Outcome, Queue]:
    """The anti-join of all pictures with those of the ledger."""
    compute, parquet = arrow("pyarrow.compute"), arrow("pyarrow.parquet")
    known = standing(job.folder)
    attempts = {} if retry else known.attempts
    aside = set() if retry else {key for key in known.set_aside if shard.has(key)}
    outcome = Outcome(set_aside=sorted(aside))
    left = []
    with parquet.ParquetFile(job.table) as file:
        for batch in file.iter_batches(batch_size=65_536, columns=["key"]):
            keys = batch["key"]
            is_done = compute.is_in(keys, known.done).to_pylist()
            mine = [shard.has(key) for key in keys.to_pylist()]
            outcome.pictures += sum(mine)
            outcome.before += sum(one and done for one, done in zip(mine, is_done, strict=True))
            left.append(
                [m and not d and k not in aside for m, d, k in zip(mine, is_done, keys.to_pylist(), strict=True)]
            )

    def pictures() -> Iterator[Picture]:
        with parquet.ParquetFile(job.table) as file:
            for batch, wanted in zip(file.iter_batches(batch_size=65_536), left, strict=True):
                if any(wanted):
                    for part in arrow().Table.from_batches([batch]).filter(arrow().array(wanted)).to_batches(1024):
                        yield from (Picture(**one) for one in part.to_pylist())

    return outcome, Queue(pictures(), attempts, size)


def _failed(queue: Queue, ledger: Ledger, outcome: Outcome, batch: Batch, error: Exception) -> int:
    """Take a failure down, and try again; returns how many pictures are set aside by it.

    Only a picture that failed alone has failed: of several, it may have been any.
    """
    if len(batch) > 1:
        queue.again(batch)
        return 0
    for picture in batch:
        attempt = queue.attempts[picture.key] = queue.attempts.get(picture.key, 0) + 1
        text = f"{type(error).__name__}: {reason(error)}"
        entry = Entry(picture.key, picture.row, picture.seed, attempt=attempt, state="failed", error=text)
        ledger.add([entry])
        if attempt < ATTEMPTS:
            queue.again(batch)
            return 0
        outcome.set_aside.append(picture.key)
    return len(batch)


def _take_down_deaths(job: Job, ledger: Ledger) -> None:
    """Of a run that died while it drew one picture alone, that picture may be why."""
    keys = ledger.died_on()
    if len(keys) == 1:
        attempt = standing(job.folder).attempts.get(keys[0], 0) + 1
        error = "Died: the process ended while generating this image"
        ledger.add([Entry(keys[0], 0, 0, attempt=attempt, state="failed", error=error)])
        ledger.flush()
    ledger.in_flight([])


def _sweep_shards(job: Job, shard: Shard) -> None:
    """Remove what earlier runs left of WebDataset shards that the ledger never came to know: they are drawn again."""
    places = [*(job.folder / "shards").glob(f"{shard.label}.*.tar"), *(job.folder / "shards").glob(f".{shard.label}.*")]
    if places:
        known = {path.partition("#")[0] for path in read_ledger(job.folder, ["path"])["path"].to_pylist()}
        for place in places:
            if place.relative_to(job.folder).as_posix() not in known:
                place.unlink(missing_ok=True)
