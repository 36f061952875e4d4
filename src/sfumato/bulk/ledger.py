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
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from sfumato.bulk.job import Job, Shard

__all__ = ["Entry", "Ledger", "Standing", "conflicts", "is_state", "read_ledger", "standing"]

# Failed attempts after which an image is set aside.
ATTEMPTS = 3
# Seconds between two files; number of a run's files that are merged into one.
PERIOD, MOST_FILES = 10.0, 64
# Rows that are merged at a time.
MOST_ROWS = 20_000


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
            self._write([arrow().Table.from_pylist([asdict(one) for one in self._open], schema=_schema())])
            self._open = []
        self._last = time.monotonic()
        if len(self._written) >= MOST_FILES:
            self._merge(self._written)

    def compact(self) -> None:
        """Merge all files of this part of the job, including earlier runs', into one file with one row per key."""
        mine = sorted(self.folder.glob(f"part-{'*' if self.label == '1of1' else self.label + '.*'}.parquet"))
        if len(mine) > 1 or self._files:  # one file may hold a failure and then the image of one key
            self._merge(mine)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove keys, so that the next run generates them again."""
        self._merge(sorted(self.folder.glob("part-*.parquet")), keys)

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

    def _write(self, tables: Iterable[Any]) -> None:
        self._files += 1
        path, parquet = self.folder / f"part-{self.worker}-{self._files:06d}.parquet", arrow("pyarrow.parquet")
        with replacing(path) as temporary, parquet.ParquetWriter(temporary, _schema(), compression="zstd") as file:
            for table in tables:
                file.write_table(table)
        self._written.append(path)
        arrow().default_memory_pool().release_unused()  # or each file would leave some

    def _merge(self, paths: list[Path], forgotten: Iterable[str] = ()) -> None:
        finished, gone = _standing(_concat(paths, ["key", "state", "attempt"])).done, set(forgotten)
        self._written = []
        self._write(_first(paths, lambda key, state: key not in gone and (state == "done" or key not in finished)))
        for path in paths:
            path.unlink(missing_ok=True)


def _first(paths: list[Path], stays: Callable[[str, str], bool]) -> Iterator[Any]:
    """Yield the rows of files, in tables, without what does not stay and what was there before.

    If a key's images differ, all stay. Neither Arrow's joins nor all rows at a time: a job's memory should be the same
    from beginning to end.
    """
    seen, kept = set[str](), list[Any]()
    for path in paths:
        table, mask = _concat([path]), list[bool]()
        for key, state, sha256, worker, attempt in _rows(table, "key", "state", "sha256", "worker", "attempt"):
            mark = key + (sha256 if state == "done" else f"{worker} {attempt}")
            mask.append(mark not in seen and stays(key, state))
            seen.add(mark)
        kept.append(table.filter(arrow().array(mask, arrow().bool_())))
        if sum(one.num_rows for one in kept) >= MOST_ROWS or path == paths[-1]:
            yield arrow().concat_tables(kept)
            kept.clear()


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
    tables, errors = [], (arrow().ArrowException, OSError, ValueError)
    schema = _schema() if columns is None else arrow().schema([_schema().field(name) for name in columns])
    for path in paths:
        try:
            # A file alone, not a dataset, which would hold 60 MB more, and as one thread, which gives memory back.
            with arrow("pyarrow.parquet").ParquetFile(path) as file:
                tables.append(file.read(columns=schema.names, use_threads=False).select(schema.names).cast(schema))
        except errors as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise OutputError(f"{path} is damaged; delete it, and the next run will restore its entries") from error
    return arrow().concat_tables(tables) if tables else schema.empty_table()


def is_state(table: Any, state: str) -> Any:
    """Return a mask of the rows in a state."""
    return arrow("pyarrow.compute").equal(table["state"], state)


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
    return _standing(read_ledger(folder, ["key", "state", "attempt"]))


def _standing(table: Any) -> Standing:
    done, attempts = set[str](), dict[str, int]()
    done.update(table["key"].filter(is_done := is_state(table, "done")).to_pylist())
    failed = table.filter(arrow("pyarrow.compute").invert(is_done))
    for key, number in _rows(failed, "key", "attempt"):
        if key not in done:
            attempts[key] = max(number, attempts.get(key, 0))
    return Standing(done, attempts)


def _rows(table: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
    for batch in table.select(columns).to_batches(max_chunksize=1000):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def conflicts(table: Any) -> list[str]:
    """Return the keys with different images, which should be identical: a machine does not compute exactly."""
    compute = arrow("pyarrow.compute")
    done = table.filter(is_state(table, "done")).group_by(["key", "sha256"], use_threads=False).aggregate([])
    counts = compute.value_counts(done["key"])
    return [one["values"] for one in counts.filter(compute.greater(counts.field("counts"), 1)).to_pylist()]
