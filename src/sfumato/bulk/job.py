"""A job on disk: its settings, its rows and their keys, and the lock of the process that runs it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sfumato.adapters.named import with_named_adapters
from sfumato.bulk.extras import arrow
from sfumato.bulk.rows import digest_of, read_rows
from sfumato.errors import SfumatoError, UsageError
from sfumato.files import expanded, file_hash, output_folder, read_json, replacing, write_json
from sfumato.jobs.keys import NUMERICS, canonical, image_key, salt_of
from sfumato.locks import is_locked, locked
from sfumato.pipelines.components import choose_scheduler
from sfumato.pipelines.loading import load
from sfumato.pipelines.parts import check_latents
from sfumato.pipelines.recipe import model_digest
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import check_sides
from sfumato.runtime.device import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["Job", "Picture", "Shard", "Sieve", "WrongCheckpoint", "held", "is_running", "open_job", "with_refiner"]

log = logging.getLogger("sfumato")

CHUNK = 20_000
FILE = "job.json"


class WrongCheckpoint(UsageError):
    """A checkpoint is not the one that the job was started with."""


class Picture(NamedTuple):
    """One picture to draw: its key, the first row that asks for it, its seed, and its request as JSON."""

    key: str
    row: int
    seed: int
    request: str


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `of` equal parts of a job; a key is always in the same one."""

    index: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "3/16". Raises `UsageError`."""
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second) <= 10**6):
            raise UsageError(f"--shard must have the form 3/16, from 1/16 to 16/16, not {text!r}")
        return cls(int(first), int(second))

    @property
    def label(self) -> str:
        """How the names of this shard's files begin."""
        return f"{self.index}of{self.of}"

    def has(self, key: str) -> bool:
        """Whether a key is in this part."""
        return self.of == 1 or int(key[:12], 16) % self.of == self.index - 1


@dataclass(frozen=True)
class Job:
    """What a job is, as `job.json` says it; a folder stays with it for good.

    source: hash of the rows; model: hash of the checkpoint; numerics: what else decides a picture's bits; rows: that
    can be drawn; bad: that cannot; pictures: different ones.
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
        """The job of a folder. Raises `UsageError` where there is none."""
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
        """All pictures, in the order of their rows."""
        return self.folder / "rows.parquet"

    def pictures_in_order(self) -> Iterator[Picture]:
        """All pictures, in the order of their rows."""
        with arrow("pyarrow.parquet").ParquetFile(self.table) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from (Picture(**one) for one in batch.to_pylist())

    def path_of(self, key: str) -> Path:
        """Where the picture of a key stands."""
        return self.folder / key[:2] / key[2:4] / f"{key}.png"

    def pending(self, key: str) -> Path:
        """Where the image of a key waits to be moved into a WebDataset shard."""
        return self.folder / "pending" / f"{key}.png"

    def write(self) -> None:
        """Say what the job is. Raises `OutputError`."""
        write_json(self.folder / FILE, {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"})


class Sieve:
    """Turns a row into images, or says why it cannot be generated."""

    def __init__(self, pipeline: DiffusionPipeline, job: Job) -> None:
        self._pipeline, self._parts, self._job = pipeline, pipeline.parts, job
        self._salt = salt_of(job.model, job.numerics)
        self._left_open = GenerateRequest().settled(self._parts.settings).to_dict()
        self._size = dict(zip(("width", "height"), self._parts.size_of(GenerateRequest()), strict=True))
        self._known: dict[tuple[Any, ...], Any] = {}

    def pictures(self, row: int, values: dict[str, Any]) -> Iterator[Picture]:
        """The images of a row. Raises a `SfumatoError` that says what is wrong with it."""
        own = hashlib.sha256(f"{self._job.id}:{row}".encode()).digest()
        sized = {} if "image" in values else self._size
        seeded = {"seed": int.from_bytes(own[:4], "big")}
        request = GenerateRequest.from_dict({**self._left_open, **sized, **seeded, **values})
        if not any(request.prompts):
            raise UsageError("the prompt is missing; add one")
        if request.refiner is not None:  # which is told where it takes over
            request = request.settled(self._parts.settings)
        request = self._with_hashes(with_named_adapters(request))
        files = self._checked(request)
        for index, seed in enumerate(request.seeds):
            alone = request if request.batch_size == 1 else request.alone(index // request.count).replace(seed=seed)
            text = canonical(alone)
            yield Picture(image_key(self._salt, files, text), row, seed, text)

    def _with_hashes(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the hash of each file that it adds, so that other files make other images."""
        added = {"adapters": request.adapters, "embeddings": request.embeddings}
        for name, files in added.items():
            added[name] = tuple(one.replace(sha256=one.sha256 or self._hash(one.file)) for one in files)
        return request.replace(**added)

    def _checked(self, request: GenerateRequest) -> str:
        """The hashes of what else a request reads, "" without any; nothing is looked at twice."""
        unit, (width, height) = self._parts.vae_scale_factor, (request.width, request.height)
        check_sides(unit, width=width, height=height)
        hires = request.hires
        for name in (request.scheduler, hires and hires.scheduler):
            self._once(lambda name=name: choose_scheduler(name, self._parts.scheduler), "scheduler", name)
        if request.image is None:
            largest = hires.sizes(width, height, unit)[0] if hires and width and height else (width, height)
            self._once(lambda: self._fits(*largest), "size", *largest)
        seen = [file for one in request.image_prompts for file in (one.image, one.mask) if file]
        files = [*request.pictures.values(), *(one.image for one in request.controls), *seen]
        read = "".join(self._hash(file) for file in files)
        return read + (
            ""
            if request.refiner is None
            else self._once(lambda: self._refiner(str(request.refiner)), "refiner", request.refiner)
        )

    def _refiner(self, name: str) -> str:
        with_refiner(self._pipeline, name, self._job.refiners)
        return self._job.refiners[name]

    def _fits(self, width: int | None, height: int | None) -> None:
        self._pipeline.place.plan(self._parts, GenerateRequest(width=width, height=height))

    def _hash(self, file: str) -> str:
        return self._once(lambda: file_hash(expanded(file), None), "file", file)

    def _once(self, find: Callable[[], Any], *what: Any) -> Any:
        if what not in self._known:
            try:
                self._known[what] = find()
            except (SfumatoError, OSError) as error:
                self._known[what] = error
        if isinstance(found := self._known[what], Exception):
            raise found
        return found


def with_refiner(pipeline: DiffusionPipeline, name: str | None, known: dict[str, str]) -> DiffusionPipeline | None:
    """The refiner that a request names, loaded unless the last one was the same. known: digests by name, added to.

    Raises `WrongCheckpoint` if it is not the known one, `UsageError` if it needs other latents.
    """
    if name is None or (pipeline.refiner is not None and pipeline.refiner.name == name):
        return None if name is None else pipeline.refiner
    pipeline.refiner = None  # so that two are never in memory
    place = expanded(name)
    where = str(place.absolute()) if place.exists() else name
    refiner = load(where, device=pipeline.device.type, dtype=pipeline.dtype, local_files_only=True)
    check_latents(pipeline.parts, refiner.parts)
    if known.setdefault(name, digest := model_digest(refiner.parts)) != digest:
        raise WrongCheckpoint(f"the refiner {name} is not the one this job was started with; restore it")
    refiner.name = name
    pipeline.refiner = refiner
    return refiner


def open_job(
    folder: Path,
    source: Path,
    pipeline: DiffusionPipeline,
    *,
    device: str | None = None,
    name: str | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[int, Exception], None],
    on_pictures: Callable[[list[Picture]], None] | None = None,
) -> Job:
    """The job of a folder, planned if it is new: every row is checked, and `on_bad` told of each that cannot be drawn.

    name: the job's id, from its rows' hash if None; device: the kind that workers draw on, the pipeline's if None;
    on_pictures: takes the pictures in chunks, and nothing is written then. Raises `UsageError` for bad rows, unless
    they are to be skipped, and for another job than the folder's.
    """
    digest = digest_of(source)
    numerics = {"version": NUMERICS, "device": device or pipeline.device.type, "dtype": dtype_name(pipeline.dtype)}
    job = Job(folder, name or digest, digest, model_digest(pipeline.parts), numerics)
    if on_pictures is not None:
        return _sifted(job, source, Sieve(pipeline, job), on_pictures, on_bad, skip_bad=skip_bad)
    if (folder / FILE).is_file():
        found = Job.read(folder)
        _check_same(found, job, named=name is not None)
        return found
    try:
        with _writer(job) as write:
            job = _sifted(job, source, Sieve(pipeline, job), write, on_bad, skip_bad=skip_bad)
        job.write()
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
    return job


def _check_same(found: Job, job: Job, *, named: bool) -> None:
    where = f"of the job in {found.folder}"
    if found.source != job.source or (named and found.id != job.id):
        raise UsageError(f"these are not the rows {where}; use another --output for them")
    if found.model != job.model:
        raise UsageError(f"this is not the checkpoint {where}, or it has changed since; use another --output")
    if found.numerics != job.numerics:
        kind = "{device} in {dtype}".format(**found.numerics)
        raise UsageError(
            f"the images {where} are generated on {kind}; set --device and --dtype accordingly, or use another --output"
        )


def _sifted(
    job: Job,
    source: Path,
    sieve: Sieve,
    write: Callable[[list[Picture]], None],
    on_bad: Callable[[int, Exception], None],
    *,
    skip_bad: bool,
) -> Job:
    """Hand all different pictures of a file to `write`, in chunks; returns the job with how many of what there are."""
    rows = bad = 0
    keys: set[bytes] = set()
    chunk: list[Picture] = []
    for number, values in read_rows(source):
        try:
            if isinstance(values, SfumatoError):
                raise values
            pictures = list(sieve.pictures(number, values))
        except SfumatoError as error:
            bad += 1
            on_bad(number, error)
            continue
        rows += 1
        for picture in pictures:
            key = bytes.fromhex(picture.key)
            if key not in keys:
                keys.add(key)
                chunk.append(picture)
        if len(chunk) >= CHUNK:
            write(chunk)
            chunk = []
    write(chunk)
    if bad and not skip_bad:
        raise UsageError(
            f"{bad:,} of {bad + rows:,} rows of {source} have errors (see above); fix them, or skip them "
            "with --skip-bad"
        )
    if not rows:
        raise UsageError(f"{source} has no valid rows; write one request per line")
    return dataclasses.replace(job, rows=rows, bad=bad, pictures=len(keys))


@contextmanager
def _writer(job: Job) -> Iterator[Any]:
    arrow_, parquet = arrow(), arrow("pyarrow.parquet")
    kinds = {"key": arrow_.string(), "row": arrow_.int64(), "seed": arrow_.int64(), "request": arrow_.string()}
    schema = arrow_.schema(kinds)
    output_folder(job.folder)
    with replacing(job.table) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as file:

        def write(pictures: list[Picture]) -> None:
            columns = zip(*pictures, strict=True) if pictures else [()] * len(kinds)
            file.write_table(arrow_.table(dict(zip(kinds, map(list, columns), strict=True)), schema))

        yield write


@contextmanager
def held(job: Job, shard: Shard) -> Iterator[None]:
    """Within the block nobody else draws this part of the job; one that covers it too is refused with `UsageError`.

    Where the file system has no locks, that is said, and nobody is refused.
    """
    with ExitStack() as stack:
        for name, alone in (("lock", shard.of == 1), (f"lock.{shard.label}", True)):
            busy = f"another run of this job draws into {job.folder}; wait until it ends, or stop it first"
            unknown = f"{job.folder} is on a file system without locks; start no second run of this job"
            stack.enter_context(locked(job.folder / name, alone=alone, busy=busy, unknown=unknown))
        yield


def is_running(job: Job) -> bool:
    """Whether somebody draws this job now, as far as the file system can tell."""
    return is_locked(job.folder / "lock")
