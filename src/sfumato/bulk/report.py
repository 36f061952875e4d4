"""Reports on a job: its estimate, its progress, and its contents."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
import time
from typing import TYPE_CHECKING, Any

from sfumato.bulk.extras import arrow
from sfumato.bulk.job import Job, is_running
from sfumato.bulk.ledger import conflicts, is_state, read_ledger, standing
from sfumato.bulk.shards import image_at, write_shard
from sfumato.errors import UsageError
from sfumato.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sfumato.bulk.job import Picture
    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["Check", "contact_sheet", "estimate", "image_of", "status", "thumbnails", "verify", "webdataset"]


def estimate(
    pipeline: DiffusionPipeline, sample: Sequence[Picture], pictures: int, workers: int, price: float
) -> dict[str, Any]:
    """Estimate the time, size and cost of a job from a sample, which is discarded. price: of one worker hour."""
    from sfumato.bulk.painter import batch_size, draw_requests
    from sfumato.metadata.carriers import image_bytes

    seconds, sizes = [], []
    for picture in [*sample[:1], *sample]:  # the first one warms up
        requests = [json.loads(picture.request)] * batch_size(pipeline, picture)
        began = time.perf_counter()
        images, recipes, _ = draw_requests(pipeline, requests)
        sizes.append(len(image_bytes(images[0], recipes[0])))
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
    """Return the progress of a job; takes less than a second for a million images. price: of one worker hour.

    The rate is that of the last run of each part, by monotonic clocks, so clock changes do not affect it.
    """
    compute, job = arrow("pyarrow.compute"), Job.read(folder)
    table = read_ledger(folder, ["row", "seed", "state", "seconds", "bytes", "error", "worker", "elapsed"])
    is_done = is_state(table, "done")
    done, failed = table.filter(is_done), table.filter(compute.invert(is_done))
    keys = done.group_by(["row", "seed"]).aggregate([]).num_rows  # in place of the keys: numbers are compared quickly
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
    """The result of `verify`: keys or files by problem, and the PSNR in dB of images that were generated again."""

    @property
    def is_whole(self) -> bool:
        """Whether there are no problems."""
        return not any(self[name] for name in ("missing", "changed", "not_drawn", "orphans", "alarms", "differ"))


def verify(job: Job, pipeline: DiffusionPipeline | None = None, redraw: int = 0, seed: int | None = None) -> Check:
    """Hash every file, generate some images again, and compare both with the ledger and the job's rows.

    redraw: number of images to generate again with the pipeline, chosen at random with `seed`.
    """
    known, keys = _done(job), [one.key for one in job.pictures_in_order()]
    found = Check(images=job.pictures, checked=len(known), missing=[], changed=[], differ=[], decibels={})
    for entry in known.values():
        if (data := image_of(job, entry)) is None:
            found["missing"].append(entry["key"])
        elif hashlib.sha256(data).hexdigest() != entry["sha256"]:
            found["changed"].append(entry["key"])
    found["not_drawn"] = [key for key in keys if key not in known]
    paths = {entry["path"].partition("#")[0] for entry in known.values()}
    there = (path.relative_to(job.folder).as_posix() for path in job.folder.glob("*/**/*"))
    found["orphans"] = [
        path for path in there if re.fullmatch(r"(../../\w+\.png|shards/.*\.tar)", path) and path not in paths
    ]
    found["alarms"] = conflicts(read_ledger(job.folder, ["key", "state", "sha256"]))
    if pipeline is not None and redraw:
        whole = sorted(known.keys() - {*found["missing"], *found["changed"]})
        chosen = random.Random(seed).sample(whole, min(redraw, len(whole)))
        _redraw(job, pipeline, [known[key] for key in chosen], found)
    return found


def _redraw(job: Job, pipeline: DiffusionPipeline, entries: list[dict[str, Any]], found: Check) -> None:
    from PIL import Image

    from sfumato.bulk.painter import draw_requests
    from sfumato.images import psnr

    chosen = {entry["key"] for entry in entries}
    requests = {one.key: one.request for one in job.pictures_in_order() if one.key in chosen}
    for entry in entries:
        request = json.loads(requests[entry["key"]])
        image = draw_requests(pipeline, [request], refiners=job.refiners)[0][0]
        likeness = psnr(Image.open(io.BytesIO(image_of(job, entry) or b"")), image)
        found["decibels"][entry["key"]] = likeness
        if likeness < float("inf"):
            found["differ"].append(entry["key"])


def image_of(job: Job, entry: dict[str, Any]) -> bytes | None:
    """Return the PNG of a ledger row; None if it is missing."""
    return image_at(job.folder, entry["path"], entry["offset"], entry["bytes"])


def _done(job: Job) -> dict[str, dict[str, Any]]:
    """Return the ledger row of each finished image by key, in the order of the files."""
    table = read_ledger(job.folder, ["key", "state", "path", "offset", "bytes", "sha256"])
    rows = table.filter(is_state(table, "done")).sort_by([("path", "ascending"), ("offset", "ascending")])
    return {one["key"]: one for one in rows.to_pylist()}


def _drawn(job: Job) -> Iterator[tuple[Picture, dict[str, Any]]]:
    """Yield all finished images in the order of their rows, with their ledger rows."""
    if not (known := _done(job)):
        raise UsageError(f"{job.folder} has no images yet; generate some with 'sfumato bulk run'")
    return ((one, known[one.key]) for one in job.pictures_in_order() if one.key in known)


def contact_sheet(job: Job, file: Path, count: int, size: int) -> Path:
    """Write a PNG with images spread evenly over the job. size: width and height of each image in pixels."""
    from PIL import Image

    from sfumato.images import auto_grid, fitted
    from sfumato.metadata.carriers import save_picture

    entries = [entry for _, entry in _drawn(job)]
    chosen = [entries[n * len(entries) // count] for n in range(count)] if len(entries) > count else entries
    images = [Image.open(io.BytesIO(data)).convert("RGB") for one in chosen if (data := image_of(job, one))]
    return save_picture(auto_grid([fitted(image, (size, size)) for image in images]), file)


def webdataset(job: Job, folder: Path, most: int) -> list[Path]:
    """Write all images to WebDataset shards of at most `most` images, in the order of their keys."""
    drawn = sorted(_drawn(job), key=lambda one: one[0].key)
    found = ((one, data) for one, entry in drawn if (data := image_of(job, entry)) is not None)
    written = []
    while part := [(one.key, one.request, data) for one, data in itertools.islice(found, most)]:
        written.append(folder / f"shard-{len(written):05d}.tar")
        write_shard(written[-1], part)
    return written


def thumbnails(job: Job, file: Path, size: int) -> Path:
    """Write a Parquet file with key, row, seed, request, path and a JPEG (at most `size` pixels per side) per image."""
    arrow_, parquet, drawn = arrow(), arrow("pyarrow.parquet"), _drawn(job)
    kinds = {"key": "string", "row": "int64", "seed": "int64", "request": "string", "path": "string"}
    schema = arrow_.schema(
        [(name, getattr(arrow_, kind)()) for name, kind in (kinds | {"thumbnail": "binary"}).items()]
    )
    with replacing(file) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while part := list(itertools.islice(drawn, 1024)):
            rows = [
                one._asdict() | {"path": entry["path"], "thumbnail": _small(image_of(job, entry), size)}
                for one, entry in part
            ]
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
