"""A worker: a warm pipeline that generates a batch of rows and stores each image under its key."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from sfumato.bulk.job import Job, Picture, WrongCheckpoint
from sfumato.bulk.ledger import Entry
from sfumato.bulk.planning import with_refiner
from sfumato.errors import OutputError, SfumatoError
from sfumato.files import output_folder, replacing
from sfumato.metadata.carriers import image_bytes, read_recipe
from sfumato.pipelines.draw import draw
from sfumato.pipelines.loading import load
from sfumato.pipelines.recipe import model_digest
from sfumato.request import GenerateRequest
from sfumato.runtime.device import release_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["BATCH_SECONDS", "FATAL", "Painter", "Stopped", "Work", "batch_size", "draw_requests", "settings_of"]

# Fields in which the rows of a batch may differ; the largest batch that the plan considers; the most characters of a
# batch's notes in the ledger, which holds them once per image, and in memory while it is compacted.
OWN = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "seed")
MOST_AT_ONCE, MOST_NOTES = 64, 200
# Images that are drawn sooner than this share what is done once for a batch, even if their steps run one by one. A
# stopped run finishes its batch.
BATCH_SECONDS = 4.0
# Seconds after which memory is given back to the system: what batches leave between things that stay would add up.
RELEASE_PERIOD = 5.0


class Stopped(Exception):
    """The run was asked to stop, and there was no time to finish these images."""


# Errors that are not caused by an image: the run ends.
FATAL = (OutputError, WrongCheckpoint)


@dataclass(frozen=True)
class Work:
    """All settings of a worker. They are small, so that it can be started anywhere.

    model: where the checkpoint is; name: its name in recipes; shards: whether images are moved to WebDataset shards.
    """

    folder: str
    model: str
    name: str
    device: str | None = None
    dtype: str | None = None
    variant: str | None = None
    micro_batch: int | None = None
    threads: int | None = None
    shards: bool = False

    def load(self, device: str | None = None) -> DiffusionPipeline:
        """Load the pipeline."""
        import torch

        from sfumato.runtime.device import parse_dtype

        pipeline = load(
            self.model, device=device or self.device, dtype=parse_dtype(self.dtype), variant=self.variant,
            micro_batch=self.micro_batch, eight_bit=False,  # images must not depend on a worker's memory
        )  # fmt: skip
        if pipeline.device.type == "cpu" and pipeline.place.facts is not None:
            torch.set_num_threads(self.threads or pipeline.place.facts.free_cores)
        pipeline.name = self.name
        return pipeline


class Painter:
    """Generates batches of images, writes each to its file, and returns an `Entry` for it."""

    def __init__(self, work: Work, pipeline: DiffusionPipeline | None = None) -> None:
        """Raises `WrongCheckpoint` if the checkpoint is not the job's."""
        self.job = Job.read(Path(work.folder))
        self.pipeline = pipeline or work.load()
        if model_digest(self.pipeline.parts) != self.job.model:
            raise WrongCheckpoint(f"the checkpoint {work.name} is not the one this job was started with; restore it")
        self._place = self.job.pending if work.shards else self.job.path_of
        self._released = time.monotonic()

    def draw(self, pictures: Sequence[Picture], check: Callable[[], None] = lambda: None) -> list[Entry]:
        """Generate images that do not exist yet. Their requests may differ only in prompts and seeds.

        check: called after each step; an exception that it raises stops the generation.
        """
        found = [entry for one in pictures if (entry := self._found(one))]
        there = {one.key for one in found}
        if not (left := [one for one in pictures if one.key not in there]):
            return found
        began = time.perf_counter()
        requests = [json.loads(one.request) for one in left]
        images, recipes, notes = draw_requests(self.pipeline, requests, check, self.job.refiners)
        seconds, note = (
            (time.perf_counter() - began) / len(left),
            shorten("; ".join(notes), MOST_NOTES, placeholder=" …"),
        )
        for picture, image, recipe in zip(left, images, recipes, strict=True):
            path, data = self._place(picture.key), image_bytes(image, recipe)
            output_folder(path.parent)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            found.append(self._entry(picture, data, seconds, note))
        if time.monotonic() - self._released > RELEASE_PERIOD:
            release_memory(self.pipeline.device)
            self._released = time.monotonic()
        return found

    def _found(self, picture: Picture) -> Entry | None:
        """Return an entry for an image that already exists, because a run died between writing and recording it."""
        path = self._place(picture.key)
        with suppress(SfumatoError, OSError):
            if path.is_file() and read_recipe(path)["request"] == json.loads(picture.request):
                return self._entry(picture, path.read_bytes())
        return None

    def _entry(self, picture: Picture, data: bytes, seconds: float = 0.0, notes: str = "") -> Entry:
        path = self._place(picture.key).relative_to(self.job.folder).as_posix()
        digest, device = hashlib.sha256(data).hexdigest(), self.pipeline.device.type
        return Entry(
            picture.key, picture.row, picture.seed, path, digest, len(data), seconds=seconds, device=device, notes=notes
        )


def settings_of(picture: Picture) -> str:
    """Return the settings that images must share to be generated in one batch, as JSON."""
    request = json.loads(picture.request)
    given = [name for name in OWN if name in request]
    return json.dumps([given, {name: value for name, value in request.items() if name not in OWN}], sort_keys=True)


def batch_size(pipeline: DiffusionPipeline, picture: Picture, seconds: float = 0.0) -> int:
    """Return the batch size that the plan allows for an image's settings, or as many images as take so many seconds."""
    request = GenerateRequest.from_dict(json.loads(picture.request))
    plan = pipeline.place.plan(pipeline.parts, request.replace(count=MOST_AT_ONCE))
    if plan is None:
        return 1
    return max(plan.micro_batch, min(MOST_AT_ONCE, int(seconds * MOST_AT_ONCE / max(plan.seconds, 1e-3))))


def draw_requests(
    pipeline: DiffusionPipeline,
    requests: Sequence[dict[str, Any]],
    check: Callable[[], None] = lambda: None,
    refiners: dict[str, str] | None = None,
) -> tuple[list[Image], list[dict[str, Any]], Sequence[str]]:
    """Generate one image per request. Returns the images, their recipes, and the notes on the batch.

    The recipes contain no notes, because an image's file must not depend on the other images of its batch.
    """
    first = requests[0]
    texts = {name: tuple(one[name] for one in requests) for name in OWN[:-1] if name in first}
    request = GenerateRequest.from_dict({**first, **texts})
    other = with_refiner(pipeline, request.refiner, {} if refiners is None else refiners)
    refiner = None if other is None else (other.parts, other.place)
    loop = draw(pipeline.parts, pipeline.place, request, refiner, seeds=[one["seed"] for one in requests])
    while True:
        try:
            next(loop)
        except StopIteration as end:
            result = end.value
            break
        check()
    shared = {**result.recipes[0], "notes": []}
    return result.images, [shared | {"request": one} for one in requests], result.notes
