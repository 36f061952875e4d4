"""Reports on a job: its estimate, its progress, and its contents."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
import tarfile
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.bulk.extras import arrow
from sfumato.bulk.job import Job, Picture, is_running
from sfumato.bulk.ledger import conflicts, read_ledger, standing
from sfumato.bulk.painter import Shards, batch_size, draw_requests
from sfumato.errors import UsageError
from sfumato.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["Check", "contact_sheet", "estimate", "status", "thumbnails", "verify", "webdataset"]


def estimate(
    pipeline: DiffusionPipeline, sample: Sequence[Picture], pictures: int, workers: int, price: float
) -> dict[str, Any]:
    """Time, bytes and cost of a job, from drawing a sample of it; nothing is kept. price: of a worker's hour."""
    from sfumato.metadata.carriers import png_bytes

    seconds, sizes = [], []
    for picture in [*sample[:1], *sample]:  # the first one warms up
        requests = [json.loads(picture.request)] * batch_size(pipeline, picture)
        began = time.perf_counter()
        images, recipes, _ = draw_requests(pipeline, requests)
        sizes.append(len(png_bytes(images[0], recipes[0])))
        seconds.append((time.perf_counter() - began) / len(requests))
    each, size = (sum(numbers[1:]) / len(sample) for numbers in (seconds, sizes))
    hours = each * pictures / 3600
    return {
        "seconds_each": each,
        "bytes_each": round(size),
        "workers": workers,
        "seconds": 3600 * hours / workers,
        "bytes": round(size * pictures),
        "worker_hours": hours,
        "cost": hours * price,
    }


def status(folder: Path, price: float = 0.0) -> dict[str, Any]:
    """How far a job is; of a million pictures within a second. price: of a worker's hour, for what was spent.

    The rate is that of the last run of each part, by clocks that never jump, so it holds whatever the time of day says.
    """
    compute, job = arrow("pyarrow.compute"), Job.read(folder)
    table = read_ledger(folder, ["key", "state", "seconds", "bytes", "error", "worker", "elapsed"])
    is_done = compute.equal(table["state"], "done")
    done, failed = table.filter(is_done), table.filter(compute.invert(is_done))
    keys = compute.count_distinct(done["key"]).as_py()
    known = standing(folder).set_aside if failed.num_rows else set()
    drawn = done["seconds"].filter(compute.greater(done["seconds"], 0))
    middle, slow = compute.quantile(drawn, [0.5, 0.95]).to_pylist() if len(drawn) else (None, None)
    rate, left = _rate(done), job.pictures - keys - len(known)
    counts = compute.value_counts(compute.replace_substring_regex(failed["error"], ":.*", "")).to_pylist()
    spent = compute.sum(drawn).as_py() or 0.0
    return {
        "images": job.pictures,
        "done": keys,
        "left": left,
        "set_aside": len(known),
        "running": is_running(job),
        "images_per_second": rate,
        "seconds_left": left / rate if rate else None,
        "seconds_each": {"p50": middle, "p95": slow},
        "bytes": compute.sum(done["bytes"]).as_py() or 0,
        "worker_hours": spent / 3600,
        "cost": spent / 3600 * price,
        "errors": {one["values"]: one["counts"] for one in counts},
        "alarms": conflicts(read_ledger(folder, ["key", "state", "sha256"])) if keys < done.num_rows else [],
    }


def _rate(done: Any) -> float:
    groups = done.select(["worker", "elapsed"]).group_by("worker").aggregate([("elapsed", "max"), ("elapsed", "count")])
    last: dict[str, dict[str, Any]] = {}
    for one in sorted(groups.to_pylist(), key=lambda one: one["worker"]):
        last[one["worker"].partition(".")[0]] = one
    return sum(one["elapsed_count"] / one["elapsed_max"] for one in last.values() if one["elapsed_max"])


class Check(dict[str, Any]):
    """What `verify` found: lists of keys or files by what is wrong with them, and how near pictures came again."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self[name] for name in ("missing", "changed", "not_drawn", "orphans", "alarms", "differ"))


def verify(job: Job, pipeline: DiffusionPipeline | None = None, redraw: int = 0, seed: int | None = None) -> Check:
    """Hash every file anew, draw some again, and compare both with the ledger and the job's rows.

    redraw: how many, by chance (`seed` of it), with the pipeline.
    """
    compute, parquet = arrow("pyarrow.compute"), arrow("pyarrow.parquet")
    table = read_ledger(job.folder, ["key", "state", "path", "sha256"])
    done = table.filter(compute.equal(table["state"], "done"))
    known = dict(
        zip(
            done["key"].to_pylist(), zip(done["path"].to_pylist(), done["sha256"].to_pylist(), strict=True), strict=True
        )
    )
    found = Check(images=job.pictures, checked=len(known), missing=[], changed=[], differ=[], decibels={})
    for key, data in _files(job, {key: path for key, (path, _) in known.items()}):
        if data is None:
            found["missing"].append(key)
        elif hashlib.sha256(data).hexdigest() != known[key][1]:
            found["changed"].append(key)
    keys = parquet.read_table(job.table, columns=["key"])["key"]
    found["not_drawn"] = keys.filter(compute.invert(compute.is_in(keys, done["key"].combine_chunks()))).to_pylist()
    paths = {path.partition("#")[0] for path, _ in known.values()}
    there = (path.relative_to(job.folder).as_posix() for path in job.folder.glob("*/**/*"))
    found["orphans"] = [
        path for path in there if re.fullmatch(r"(../../\w+\.png|shards/.*\.tar)", path) and path not in paths
    ]
    found["alarms"] = conflicts(table)
    if pipeline is not None and redraw:
        whole = sorted(known.keys() - {*found["missing"], *found["changed"]})
        _redraw(job, pipeline, random.Random(seed).sample(whole, min(redraw, len(whole))), known, found)
    return found


def _redraw(job: Job, pipeline: DiffusionPipeline, keys: list[str], known: dict[str, Any], found: Check) -> None:
    from PIL import Image

    from sfumato.images import psnr

    requests = {one.key: one.request for one in _pictures(job) if one.key in set(keys)}
    for key, data in _files(job, {key: known[key][0] for key in keys}):
        image = draw_requests(pipeline, [json.loads(requests[key])])[0][0]
        found["decibels"][key] = likeness = psnr(Image.open(io.BytesIO(data or b"")), image)
        if likeness < float("inf"):
            found["differ"].append(key)


def _pictures(job: Job) -> Iterator[Picture]:
    with arrow("pyarrow.parquet").ParquetFile(job.table) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield from (Picture(**one) for one in batch.to_pylist())


@contextmanager
def _reading(job: Job) -> Iterator[Callable[[str], bytes | None]]:
    """How to read the picture of a path in the ledger, None if it is missing; each shard is opened and listed once."""
    with ExitStack() as stack:

        @cache
        def members(file: Path) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
            tar = stack.enter_context(tarfile.open(file))
            return tar, {one.name: one for one in tar.getmembers()}

        def read(path: str) -> bytes | None:
            name, _, inner = path.partition("#")
            file = job.folder / name
            if not file.is_file():
                return None
            if file.suffix == ".png":
                return file.read_bytes()
            tar, known = members(file)
            stream = tar.extractfile(known[inner]) if inner in known else None
            return None if stream is None else stream.read()

        yield read


def _files(job: Job, paths: dict[str, str]) -> Iterator[tuple[str, bytes | None]]:
    """The bytes of pictures by their key, None for one that is missing, in the order in which they stand."""
    with _reading(job) as read:
        for key, path in sorted(paths.items(), key=lambda item: item[1]):
            yield key, read(path)


def _done(job: Job) -> dict[str, str]:
    compute, table = arrow("pyarrow.compute"), read_ledger(job.folder, ["key", "state", "path"])
    done = table.filter(compute.equal(table["state"], "done"))
    if not done.num_rows:
        raise UsageError(f"{job.folder} has no images yet; generate some with 'sfumato bulk run'")
    return dict(zip(done["key"].to_pylist(), done["path"].to_pylist(), strict=True))


def contact_sheet(job: Job, file: Path, count: int, size: int) -> Path:
    """Write pictures, evenly from all of the job, into one PNG. size: pixels of a side of each."""
    from PIL import Image

    from sfumato.images import auto_grid, fitted
    from sfumato.metadata.carriers import save_picture

    paths = _done(job)
    keys = [one.key for one in _pictures(job) if one.key in paths]
    chosen = keys[:: max(1, len(keys) // count)][:count]
    data = dict(_files(job, {key: paths[key] for key in chosen}))
    images = [Image.open(io.BytesIO(data[key] or b"")).convert("RGB") for key in chosen if data[key]]
    return save_picture(auto_grid([fitted(image, (size, size)) for image in images]), file)


def webdataset(job: Job, folder: Path, most: int) -> list[Path]:
    """Write all pictures into WebDataset shards of `most` each, in the order of their keys."""
    paths, requests = _done(job), {one.key: one for one in _pictures(job)}
    shards = Shards(folder, "shard", most)
    written = []
    with _reading(job) as read:
        for key in sorted(paths):
            data = read(paths[key])
            if data is not None:
                written.append(shards.add(requests[key], data))
            if shards.is_full:
                shards.close()
    shards.close()
    return [folder / name for name in dict.fromkeys(written)]


def thumbnails(job: Job, file: Path, size: int) -> Path:
    """Write a Parquet file of all pictures: key, row, seed, request, path, and a JPEG of at most `size` pixels."""
    arrow_, parquet, paths = arrow(), arrow("pyarrow.parquet"), _done(job)
    kinds = {
        "key": "string",
        "row": "int64",
        "seed": "int64",
        "request": "string",
        "path": "string",
        "thumbnail": "binary",
    }
    schema = arrow_.schema([(name, getattr(arrow_, kind)()) for name, kind in kinds.items()])
    drawn = (one for one in _pictures(job) if one.key in paths)
    with replacing(file) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while part := list(itertools.islice(drawn, 1024)):
            data = dict(_files(job, {one.key: paths[one.key] for one in part}))
            rows = [one._asdict() | {"path": paths[one.key], "thumbnail": _small(data[one.key], size)} for one in part]
            writer.write_table(arrow_.Table.from_pylist(rows, schema))
    return file


def _small(data: bytes | None, size: int) -> bytes | None:
    from PIL import Image

    if data is None:
        return None
    image, stream = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    image.thumbnail((size, size))
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
