"""A worker: a warm pipeline that generates a batch of rows and stores each image under its key."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.bulk.job import Job, Picture
from sfumato.bulk.ledger import Entry
from sfumato.errors import SfumatoError, UsageError
from sfumato.files import output_folder, replacing
from sfumato.metadata.carriers import png_bytes, read_recipe
from sfumato.pipelines.components import choose_scheduler
from sfumato.pipelines.recipe import describe, model_digest
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from sfumato.request import GenerateRequest
from sfumato.runtime.generators import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["Painter", "Shards", "Stopped", "Work", "batch_size", "draw_requests", "settings_of"]

# What rows drawn together may differ in.
OWN = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "seed")
# Pictures, and bytes, of a finished shard; pictures that the plan is asked about.
MOST_FILES, MOST_BYTES, MOST_AT_ONCE = 5_000, 2**30, 64


class Stopped(Exception):
    """Somebody asked for the end, and there was no time to finish these pictures."""


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know: a few words, so that it starts anywhere.

    model: where the checkpoint is, and name what recipes call it; shards: WebDataset shards in place of single files.
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
        """The pipeline, where and how it draws."""
        import torch

        from sfumato.pipelines.loading import load
        from sfumato.runtime.device import parse_dtype

        pipeline = load(
            self.model, device=device or self.device, dtype=parse_dtype(self.dtype), variant=self.variant,
            micro_batch=self.micro_batch,
        )  # fmt: skip
        if pipeline.device.type == "cpu" and pipeline.place.facts is not None:
            torch.set_num_threads(self.threads or pipeline.place.facts.free_cores)
        pipeline.name = self.name
        return pipeline


class Painter:
    """Draws batches of pictures, each put in its place and described by an `Entry`."""

    def __init__(self, work: Work, name: str = "0", pipeline: DiffusionPipeline | None = None) -> None:
        """name: distinct among the workers of a run. Raises `UsageError` if the checkpoint is not the job's."""
        self.job = Job.read(Path(work.folder))
        self.pipeline = pipeline or work.load()
        if model_digest(self.pipeline.parts) != self.job.model:
            raise UsageError(f"the checkpoint {work.name} is not the one this job was started with; restore that one")
        self._shards = Shards(self.job.folder / "shards", name) if work.shards else None
        self._held: list[Entry] = []

    def draw(self, pictures: Sequence[Picture], check: Callable[[], None] = lambda: None) -> list[Entry]:
        """Draw pictures whose requests differ in their words and seeds only; returns what is settled by now.

        check: called after each step; what it raises ends the drawing.
        """
        if not pictures:
            return []
        if self._shards is None and all(found := [self._found(one) for one in pictures]):
            return [one for one in found if one]
        began = time.perf_counter()
        images, recipes, notes = draw_requests(self.pipeline, [json.loads(one.request) for one in pictures], check)
        seconds = (time.perf_counter() - began) / len(pictures)
        entries = []
        for picture, image, recipe in zip(pictures, images, recipes, strict=True):
            data = png_bytes(image, recipe)
            shared = {"device": self.pipeline.device.type, "seconds": seconds, "notes": "; ".join(notes)}
            entries.append(self._entry(picture, self._put(picture, data), data, **shared))
        if self._shards is None:
            return entries
        self._held += entries
        return self.finish() if self._shards.is_full else []

    def finish(self) -> list[Entry]:
        """Close what is open; returns what is settled by that."""
        if self._shards is not None:
            self._shards.close()
        held, self._held = self._held, []
        return held

    def _put(self, picture: Picture, data: bytes) -> str:
        if self._shards is not None:
            return f"shards/{self._shards.add(picture, data)}#{picture.key}.png"
        path = self.job.path_of(picture.key)
        output_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return path.relative_to(self.job.folder).as_posix()

    def _found(self, picture: Picture) -> Entry | None:
        """What stands in a picture's place already: a run died after drawing it, and before the ledger knew."""
        path = self.job.path_of(picture.key)
        with suppress(SfumatoError, OSError):
            if path.is_file() and read_recipe(path)["request"] == json.loads(picture.request):
                name = path.relative_to(self.job.folder).as_posix()
                return self._entry(picture, name, path.read_bytes(), device=self.pipeline.device.type)
        return None

    @staticmethod
    def _entry(picture: Picture, path: str, data: bytes, **more: Any) -> Entry:
        digest = hashlib.sha256(data).hexdigest()
        return Entry(picture.key, picture.row, picture.seed, path, digest, len(data), **more)


def settings_of(picture: Picture) -> str:
    """What pictures that are drawn together have in common."""
    request = json.loads(picture.request)
    given = [name for name in OWN if name in request]
    return json.dumps([given, {name: value for name, value in request.items() if name not in OWN}], sort_keys=True)


def batch_size(pipeline: DiffusionPipeline, picture: Picture) -> int:
    """How many such pictures the plan computes at a time."""
    request = GenerateRequest.from_dict(json.loads(picture.request))
    plan = pipeline.place.plan(pipeline.parts, request.replace(count=MOST_AT_ONCE))
    return 1 if plan is None else plan.micro_batch


def draw_requests(
    pipeline: DiffusionPipeline, requests: Sequence[dict[str, Any]], check: Callable[[], None] = lambda: None
) -> tuple[list[Image], list[dict[str, Any]], list[str]]:
    """The pictures of requests for one each, their recipes, and what was noted of all of them together.

    Notes stay out of the recipes: which others a picture was drawn with must leave no trace in its file.
    """
    first = requests[0]
    texts = {name: tuple(one[name] for one in requests) for name in OWN[:-1] if name in first}
    request = GenerateRequest.from_dict({**first, **texts})
    generators = [generator_for(request.rng, one["seed"], request.noise) for one in requests]
    parts = pipeline.parts
    scheduler = choose_scheduler(request.scheduler, parts.scheduler)
    run = Run(parts, pipeline.place, request, Given(generators=generators), scheduler)
    loop = run.latents()
    while True:
        try:
            next(loop)
        except StopIteration as end:
            images = run.pictures(end.value)
            break
        check()
    shared = describe(parts, scheduler, run.device, GenerateRequest.from_dict(first), [])[0]
    return images, [shared | {"request": one} for one in requests], run.notes


class Shards:
    """WebDataset shards: tar files of `key.png` and `key.json`, each there when it is whole."""

    def __init__(self, folder: Path, worker: str, most: int = MOST_FILES) -> None:
        self.folder, self._worker, self._most = output_folder(folder), worker, most
        self._number = len(list(folder.glob(f"{worker}-*.tar")))
        self._part = folder / f".{worker}.part"
        self._tar: tarfile.TarFile | None = None
        self._files = 0

    @property
    def name(self) -> str:
        """The name of the shard that is being filled."""
        return f"{self._worker}-{self._number:05d}.tar"

    @property
    def is_full(self) -> bool:
        """Whether the next picture should go into another one."""
        return self._tar is not None and (self._files >= self._most or self._tar.offset >= MOST_BYTES)

    def add(self, picture: Picture, data: bytes) -> str:
        """Add a picture; returns the name of its shard."""
        if self._tar is None:
            self._tar = tarfile.TarFile(self._part, "w")
        for suffix, content in ((".png", data), (".json", picture.request.encode())):
            member = tarfile.TarInfo(picture.key + suffix)
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._files += 1
        return self.name

    def close(self) -> None:
        """Give the shard its name."""
        if self._tar is None:
            return
        self._tar.close()
        with replacing(self.folder / self.name) as temporary:
            self._part.replace(temporary)
        self._tar, self._files = None, 0
        self._number += 1
