"""The ledger: small Parquet files with one row for each finished image and each failed attempt.

Files are added by rename and never changed. Rows may be duplicated, because several workers wrote the same one or a
merge was interrupted. Readers use the first of each.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sfumato.bulk.extras import arrow
from sfumato.errors import OutputError
from sfumato.files import naming, output_folder, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from sfumato.bulk.job import Job, Shard

__all__ = ["Entry", "Ledger", "Standing", "conflicts", "is_state", "read_ledger", "standing"]

# Failed attempts after which an image is set aside.
ATTEMPTS = 3
# Seconds between two files; number of a run's files that are merged into one.
PERIOD, MOST_FILES = 10.0, 64


@dataclass(frozen=True)
class Entry:
    """The result of one attempt to generate an image.

    path: relative to the job's folder; in a shard, followed by "#" and the name in it; offset: where the PNG begins in
    the shard, in bytes; sha256: hash of the PNG; bytes: its size; seconds: generation time; device: where it ran;
    attempt: from 1; state: "done" or "failed"; error: the reason; notes: the run's notes; worker: the run that wrote
    it; elapsed: seconds since that run's start, by a monotonic clock.
    """

    key: str
    row: int
    seed: int
    path: str = ""
    sha256: str = ""
    bytes: int = 0
    seconds: float = 0.0
    offset: int = 0
    device: str = ""
    attempt: int = 1
    state: str = "done"
    error: str = ""
    notes: str = ""
    worker: str = ""
    elapsed: float = 0.0


@cache
def _schema() -> Any:
    kinds = {"int": arrow().int64(), "float": arrow().float64(), "str": arrow().string()}
    return arrow().schema([(field.name, kinds[str(field.type)]) for field in fields(Entry)])


class Ledger:
    """Writes the ledger for one run. worker: the run's name, made of its shard and the number of the run."""

    def __init__(self, job: Job, shard: Shard) -> None:
        """Raises `OutputError` if the folder cannot be written."""
        self.folder = output_folder(job.folder / "manifest")
        self.label = shard.label
        earlier = (re.match(rf"part-{self.label}\.(\d+)-", path.name) for path in self.folder.iterdir())
        number = 1 + max((int(found[1]) for found in earlier if found), default=0)
        self.worker = f"{self.label}.{number:05d}"
        self._written: list[Path] = []
        self._files, self._last = 0, time.monotonic()
        self._began, self._open = time.monotonic(), list[Entry]()
        self._flight = self.folder / f"flight-{self.label}.json"

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries. They are written to disk every few seconds."""
        elapsed = time.monotonic() - self._began
        self._open += [replace(one, worker=self.worker, elapsed=elapsed) for one in entries]
        if time.monotonic() - self._last > PERIOD:
            self.flush()

    def flush(self) -> None:
        """Write all entries to disk. Raises `OutputError`."""
        if self._open:
            self._write(arrow().Table.from_pylist([asdict(one) for one in self._open], schema=_schema()))
            self._open = []
        self._last = time.monotonic()
        if len(self._written) >= MOST_FILES:
            self._merge(self._written)

    def compact(self) -> None:
        """Merge all files of this part of the job, including earlier runs', into one file with one row per key."""
        mine = sorted(self.folder.glob(f"part-{'*' if self.label == '1of1' else self.label + '.*'}.parquet"))
        if len(mine) > 1:
            self._merge(mine)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove keys, so that the next run generates them again."""
        self._merge(sorted(self.folder.glob("part-*.parquet")), arrow().array(list(keys), arrow().string()))

    def in_flight(self, keys: Sequence[str]) -> None:
        """Record the keys of the running batch for the next run, in case this one dies. No keys: remove the record."""
        with naming(self._flight):
            if keys:
                self._flight.write_text(json.dumps(list(keys)))
            else:
                self._flight.unlink(missing_ok=True)

    def died_on(self) -> list[str]:
        """Return the keys that the last run of this part was generating when it died."""
        with suppress(OSError, ValueError):
            return [str(key) for key in json.loads(self._flight.read_text())]
        return []

    def _write(self, table: Any) -> None:
        self._files += 1
        path = self.folder / f"part-{self.worker}-{self._files:06d}.parquet"
        with replacing(path) as temporary:
            arrow("pyarrow.parquet").write_table(table, temporary, compression="zstd")
        self._written.append(path)

    def _merge(self, paths: list[Path], forgotten: Any = None) -> None:
        table, compute = _first(_concat(paths)), arrow("pyarrow.compute")
        self._written = []
        self._write(table if forgotten is None else table.filter(~compute.field("key").isin(forgotten)))
        for path in paths:
            path.unlink(missing_ok=True)


def read_ledger(folder: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a job's ledger as an Arrow table, including duplicate rows. columns: the columns to read (default: all).

    Raises `OutputError` if a file is damaged.
    """
    while True:
        paths = sorted((folder / "manifest").glob("part-*.parquet"))
        try:
            return _concat(paths, columns)
        except FileNotFoundError:  # merged in the meantime
            continue


def _concat(paths: Iterable[Path], columns: Sequence[str] | None = None) -> Any:
    parquet, tables = arrow("pyarrow.parquet"), []
    for path in paths:
        try:
            tables.append(parquet.read_table(path, columns=columns, schema=_schema(), partitioning=None))
        except (arrow().ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise OutputError(f"{path} is damaged; delete it, and the next run will restore its entries") from error
    empty = _schema().empty_table()
    return arrow().concat_tables(tables) if tables else empty.select(columns) if columns else empty


def is_state(table: Any, state: str) -> Any:
    """Return a mask of the rows in a state."""
    return arrow("pyarrow.compute").equal(table["state"], state)


def _first(table: Any) -> Any:
    """Keep the first row of each finished key, and both if their images differ. Drop failures of finished keys."""
    compute = arrow("pyarrow.compute")
    done, failed = (table.filter(is_state(table, state)) for state in ("done", "failed"))
    failed = failed.filter(compute.invert(compute.is_in(failed["key"], done["key"].combine_chunks())))
    return arrow().concat_tables([_distinct(done, ["key", "sha256"]), _distinct(failed, ["key", "worker", "attempt"])])


def _distinct(table: Any, columns: list[str]) -> Any:
    numbers = arrow().array(range(table.num_rows), arrow().int64())
    groups = table.select(columns).append_column("n", numbers).group_by(columns, use_threads=False)
    firsts = groups.aggregate([("n", "min")])["n_min"]
    return table if len(firsts) == table.num_rows else table.take(firsts)


class Standing(NamedTuple):
    """The progress of a job: the finished keys, and the failed attempts of the others."""

    done: set[str]
    attempts: dict[str, int]

    @property
    def set_aside(self) -> set[str]:
        """The keys with too many failed attempts."""
        return {key for key, number in self.attempts.items() if number >= ATTEMPTS}


def standing(folder: Path) -> Standing:
    """Read the state of each key from the ledger."""
    done, attempts, table = set[str](), dict[str, int](), read_ledger(folder, ["key", "state", "attempt"])
    done.update(table["key"].filter(is_done := is_state(table, "done")).to_pylist())
    failed = table.filter(arrow("pyarrow.compute").invert(is_done))
    for key, number in zip(failed["key"].to_pylist(), failed["attempt"].to_pylist(), strict=True):
        if key not in done:
            attempts[key] = max(number, attempts.get(key, 0))
    return Standing(done, attempts)


def conflicts(table: Any) -> list[str]:
    """Return the keys with different images, which should be identical: a machine does not compute exactly."""
    compute = arrow("pyarrow.compute")
    done = _distinct(table.filter(is_state(table, "done")).select(["key", "sha256"]), ["key", "sha256"])
    counts = compute.value_counts(done["key"])
    return [one["values"] for one in counts.filter(compute.greater(counts.field("counts"), 1)).to_pylist()]
