"""A job on disk: its settings, its rows and their keys, and the lock of the process that runs it."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sfumato.bulk.extras import arrow
from sfumato.errors import UsageError
from sfumato.files import read_json, write_json
from sfumato.locks import is_locked, locked

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FILE", "Job", "Picture", "Shard", "WrongCheckpoint", "held", "is_running"]

FILE = "job.json"


class WrongCheckpoint(UsageError):
    """A checkpoint is not the one that the job was started with."""


class Picture(NamedTuple):
    """One image to generate: its key, the first row that requests it, its seed, and its request as JSON."""

    key: str
    row: int
    seed: int
    request: str


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `of` equal parts of a job. A key is always in the same part."""

    index: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse a text such as "3/16". Raises `UsageError`."""
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second) <= 10**6):
            raise UsageError(f"--shard must have the form 3/16, from 1/16 to 16/16, not {text!r}")
        return cls(int(first), int(second))

    @property
    def label(self) -> str:
        """The prefix of the names of this shard's files."""
        return f"{self.index}of{self.of}"

    def has(self, key: str) -> bool:
        """Return whether a key is in this part."""
        return self.of == 1 or int(key[:12], 16) % self.of == self.index - 1


@dataclass(frozen=True)
class Job:
    """A job's settings, as stored in `job.json`. They never change.

    source: hash of the rows; model: hash of the checkpoint; numerics: all else that determines an image's bits;
    refiners: hashes by name; rows: number of valid rows; bad: number of rows with errors; pictures: number of different
    images.
    """

    folder: Path
    id: str
    source: str
    model: str
    numerics: dict[str, Any]
    refiners: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: int = 0
    bad: int = 0
    pictures: int = 0

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read the job in a folder. Raises `UsageError` if there is none."""
        if not (folder / FILE).is_file():
            raise UsageError(f"{folder} contains no bulk job; start one with 'sfumato bulk run ROWS --output {folder}'")
        try:
            return cls(folder, **read_json(folder / FILE))
        except TypeError as error:
            raise UsageError(
                f"{folder / FILE} was written by another version of Sfumato; start again in another folder"
            ) from error

    @property
    def table(self) -> Path:
        """The Parquet file of all images, in the order of their rows."""
        return self.folder / "rows.parquet"

    def pictures_in_order(self) -> Iterator[Picture]:
        """Yield all images in the order of their rows."""
        with arrow("pyarrow.parquet").ParquetFile(self.table) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from (Picture(**one) for one in batch.to_pylist())

    def path_of(self, key: str) -> Path:
        """Return the path of an image by its key."""
        return self.folder / key[:2] / key[2:4] / f"{key}.png"

    def pending(self, key: str) -> Path:
        """Return the path of an image that waits to be moved into a WebDataset shard."""
        return self.folder / "pending" / f"{key}.png"

    def write(self) -> None:
        """Write `job.json`. Raises `OutputError`."""
        write_json(self.folder / FILE, {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"})


@contextmanager
def held(job: Job, shard: Shard) -> Iterator[None]:
    """Lock this part of the job within the block. Raises `UsageError` if another run includes the same part.

    On a file system without locks, this only logs a warning.
    """
    with ExitStack() as stack:
        for name, alone in (("lock", shard.of == 1), (f"lock.{shard.label}", True)):
            busy = f"another run of this job is using {job.folder}; wait until it ends, or stop it"
            unknown = f"{job.folder} is on a file system without locks; do not start a second run of this job"
            stack.enter_context(locked(job.folder / name, alone=alone, busy=busy, unknown=unknown))
        yield


def is_running(job: Job) -> bool:
    """Return whether a run of this job is active, as far as the file system's locks show."""
    return is_locked(job.folder / "lock")
