"""Planning a job: its rows are checked, become images with keys, and are stored with its settings."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from sfumato.adapters.named import with_named_adapters
from sfumato.bulk.extras import arrow
from sfumato.bulk.job import FILE, Job, Picture, WrongCheckpoint
from sfumato.bulk.rows import digest_of, read_rows
from sfumato.checkpoints.builtin import builtin_path
from sfumato.errors import SfumatoError, UsageError
from sfumato.files import expanded, file_hash, output_folder, replacing
from sfumato.jobs.keys import NUMERICS, canonical, image_key, salt_of
from sfumato.pipelines.components import choose_scheduler
from sfumato.pipelines.drafts import Sketched, drafted
from sfumato.pipelines.loading import load
from sfumato.pipelines.parts import check_latents
from sfumato.pipelines.recipe import model_digest
from sfumato.pipelines.vaes import with_vae
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import check_sides
from sfumato.runtime.device import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["Sieve", "open_job", "with_refiner"]

CHUNK = 20_000
# The settings remembered at a time, each of which takes about 10 kB.
MOST_ALIKE = 4096


class _Alike(NamedTuple):
    """A request that was checked, its JSON values, and the hashes of the files it reads."""

    request: GenerateRequest
    values: dict[str, Any]
    files: str


class Sieve:
    """Converts rows to images, and checks that they can be generated."""

    def __init__(self, pipeline: DiffusionPipeline, job: Job) -> None:
        self._pipeline, self._parts, self._job = pipeline, pipeline.parts, job
        self._salt = salt_of(job.model, job.numerics)
        self._left_open = GenerateRequest().settled(self._parts.settings).to_dict()
        self._size = dict(zip(("width", "height"), self._parts.size_of(GenerateRequest()), strict=True))
        self._known: dict[tuple[Any, ...], Any] = {}
        self._like: dict[str, _Alike] = {}

    def pictures(self, row: int, values: dict[str, Any]) -> Iterator[Picture]:
        """Yield the images of a row. Raises a `SfumatoError` that explains what is wrong with it.

        If a row differs from an earlier one only in prompt and seed, only these are checked: checking all settings of a
        million rows would take minutes.
        """
        own = hashlib.sha256(f"{self._job.id}:{row}".encode()).digest()
        values = {"seed": int.from_bytes(own[:4], "big"), **values}
        prompt, seed, settings = values.get("prompt"), values["seed"], ""
        if isinstance(prompt, str) and prompt and "lora_dir" not in values:  # with which prompts may name files
            settings = repr(sorted({**values, "prompt": "", "seed": 0}.items()))
            if like := self._like.get(settings):
                like.request.check_with(prompt, seed)
                text = canonical({**like.values, "prompt": prompt, "seed": seed})
                yield Picture(image_key(self._salt, like.files, text), row, seed, text)
                return
        request = self._request(values)
        files = self._checked(request)
        if settings and request.batch_size == 1:
            if len(self._like) == MOST_ALIKE:
                self._like.clear()
            self._like[settings] = _Alike(request, request.to_dict(), files)
        for index, seed in enumerate(request.seeds):
            alone = request if request.batch_size == 1 else request.alone(index // request.count).replace(seed=seed)
            text = canonical(alone)
            yield Picture(image_key(self._salt, files, text), row, seed, text)

    def _request(self, values: dict[str, Any]) -> GenerateRequest:
        sized = {} if "image" in values else self._size
        left_open = {} if values.get("draft") else self._left_open
        request = GenerateRequest.from_dict({**left_open, **sized, **values})
        if request.draft:
            model = Sketched.of(self._parts)
            vae = request.vae or self._once(lambda: model.tiny, "tiny decoder")
            request = drafted(request.replace(vae=vae), model)[0].settled(self._parts.settings)
        if not any(request.prompts):
            raise UsageError("the prompt is missing; add one")
        if request.refiner is not None:  # fills in the default for when it takes over
            request = request.settled(self._parts.settings)
        return self._with_hashes(with_named_adapters(request))

    def _with_hashes(self, request: GenerateRequest) -> GenerateRequest:
        """Add the hashes of adapters, embeddings and VAE to the request, so that changed files give other keys."""
        if request.vae is not None:
            place, which = self._pipeline.place, (request.vae, request.vae_weights)
            told = self._once(lambda: with_vae(self._parts, place, request)[1].vae_weights, "vae", *which)
            request = request.replace(vae_weights=told)
        added = {"adapters": request.adapters, "embeddings": request.embeddings}
        if not any(added.values()):
            return request  # a copy would be checked again: a million rows take minutes
        for name, files in added.items():
            added[name] = tuple(one.replace(sha256=one.sha256 or self._hash(one.file)) for one in files)
        return request.replace(**added)

    def _checked(self, request: GenerateRequest) -> str:
        """Check a request. Returns the hashes of all other files it reads, joined; "" if there are none.

        Each result is cached.
        """
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
        return self._once(lambda: file_hash(builtin_path(file), None), "file", file)

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
    """Return the refiner that a request names, loading it unless it is in memory. known: digests by name, updated.

    Raises `WrongCheckpoint` if its digest is not the known one, and `UsageError` if it needs different latents.
    """
    if name is None or (pipeline.refiner is not None and pipeline.refiner.name == name):
        return None if name is None else pipeline.refiner
    pipeline.refiner = None  # never keep two in memory
    place = expanded(name)
    where = str(place.absolute()) if place.exists() else name
    how = {"device": pipeline.device.type, "dtype": pipeline.dtype, "local_files_only": True}
    refiner = load(where, **how, eight_bit=False)  # as in `Work.load`
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
    """Open the job in a folder, or create it after checking every row. on_bad: called for each row with errors.

    name: the job's id (default: a hash of the rows); device: the workers' device type (default: the pipeline's);
    on_pictures: receives the images in chunks, and nothing is written. Raises `UsageError` for rows with errors unless
    `skip_bad`, and if the folder contains a different job.
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
        raise UsageError(f"these are not the rows {where}; use another --output")
    if found.model != job.model:
        raise UsageError(f"this is not the checkpoint {where}, or it has changed; use another --output")
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
    """Pass all different images of a file to `write`, in chunks. Returns the job with its numbers filled in."""
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
