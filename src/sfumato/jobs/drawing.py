"""Image generation in the worker: models in memory, previews, and image files. Needs torch."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import SfumatoError
from sfumato.files import file_hash, replacing
from sfumato.jobs.keys import NUMERICS, canonical, image_key, salt_of
from sfumato.jobs.preview import Colors
from sfumato.metadata.carriers import read_recipe
from sfumato.pipelines import stages
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.controlling import with_sizes
from sfumato.pipelines.drafts import drafted
from sfumato.pipelines.finite import FiniteWatch
from sfumato.pipelines.loading import load
from sfumato.pipelines.recipe import model_digest
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.source import open_source
from sfumato.request import GenerateRequest
from sfumato.runtime.canaries import checked
from sfumato.runtime.choices import Wishes, task_of
from sfumato.runtime.device import dtype_name, parse_dtype
from sfumato.runtime.facts import read_facts
from sfumato.runtime.plan import plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.result import Step

__all__ = ["Loaded", "Shown", "colors_of", "encoded", "enlarged", "is_of", "key_of", "load_model", "planned",
           "settled", "write"]  # fmt: skip

# Seconds between two progress reports and between two previews, and the longer side of a preview in pixels. A page that
# renders every step of a fast model takes as much CPU time as the model.
PROGRESS_SECONDS, PREVIEW_SECONDS, PREVIEW_SIDE = 0.1, 0.2, 256


class Loaded:
    """A model in memory, with its preview colors and timing. wanted: the options it was loaded with."""

    def __init__(self, wanted: tuple[Any, ...], pipeline: DiffusionPipeline) -> None:
        self.wanted, self.pipeline = wanted, pipeline
        self.decode_seconds = 0.0
        self.colors: Colors | None = None
        with suppress(Exception):  # no previews if the decoder is not in memory or supports only one size
            self.colors = colors_of(pipeline)


class Shown:
    """The progress information for one image while it is generated."""

    def __init__(self, message: Mapping[str, Any], model: Loaded, place: int) -> None:
        self.message, self.place = message, place
        self._model, self._began = model, time.perf_counter()
        self._last = self._reported = 0.0

    def of(self, step: Step) -> dict[str, Any]:
        """Return the step, the seconds left once known, and sometimes a preview; empty if it is too soon to report."""
        now = time.perf_counter()
        if now - self._reported < PROGRESS_SECONDS and 1 < step.number < step.total:
            return {}
        self._reported = now
        told: dict[str, Any] = {"place": self.place, "step": step.number, "total": step.total, "at": time.time()}
        if step.number == 1:
            self._first = now
        else:
            pace = (now - self._first) / (step.number - 1)
            told["seconds_left"] = pace * (step.total - step.number) + self._model.decode_seconds
        colors = self._model.colors
        wanted = self.message["options"].get("preview", True) and step.number < step.total
        if wanted and colors is not None and now - self._last > PREVIEW_SECONDS:
            self._last = now
            told["preview"] = encoded(enlarged(colors.image(step.original())), "JPEG")
        return told

    def partial(self, step: Step) -> dict[str, Any]:
        """Return the requested partial image that this step gives, with its index from 0; empty if it gives none."""
        wanted = self.message["options"].get("partials", 0)
        steps = [step.total * (number + 1) // (wanted + 1) for number in range(wanted)]
        if step.number not in steps:
            return {}
        told, picture = {"place": self.place, "number": steps.index(step.number)}, step.preview()[0]
        return {**told, "size": picture.size, "image": encoded(picture, "PNG")}


def load_model(
    message: Mapping[str, Any], request: GenerateRequest | None, device: str | None, dtype: str | None
) -> DiffusionPipeline:
    """Load a model; with the option "lean", in the way that needs the least memory. request: one with a refiner."""
    options, lean = message["options"], message["options"].get("lean", False)
    if message["kind"] == "core-ml":
        from sfumato.coreml.pipeline import load_pipeline

        unit = options.get("compute_unit")
        pipeline = load_pipeline(message["model"], compute_unit=unit, reduce_memory=lean, local_files_only=True)
        torch.set_num_threads(read_facts("cpu").free_cores)
        return pipeline
    less: dict[str, Any] = {"offload": "staged", "micro_batch": 1} if lean else {}
    how = {"device": device, "dtype": parse_dtype(dtype), "request": request, "local_files_only": True, **less}
    pipeline = load(message["model"], **how)
    if lean:
        pipeline.enable_vae_tiling()
    if pipeline.device.type == "cpu" and pipeline.place.facts is not None:
        torch.set_num_threads(pipeline.place.facts.free_cores)
    pipeline.name = message["name"]
    return pipeline


def colors_of(pipeline: DiffusionPipeline) -> Colors:
    """Fit the preview colors to a checkpoint's decoder."""
    vae = pipeline.parts.vae
    with torch.no_grad():
        return Colors(
            lambda latents: stages.decode(vae, latents.to(vae.device, vae.dtype), FiniteWatch([])),
            vae.config.latent_channels,
        )


def planned(message: Mapping[str, Any], device: str | None, dtype: str | None) -> dict[str, Any]:
    """Estimate the time and memory of a request on this machine. The model does not have to be loaded."""
    source = open_source(message["model"], ComponentFiles(), {"local_files_only": True})
    request = drafted(GenerateRequest.from_dict(message["request"]), source)[0].settled(source.settings)
    sizes = with_sizes(read_sizes(source), request)
    facts, task = checked(read_facts(device), sizes), task_of(sizes, request)
    found = plan(facts, sizes, request, Wishes(device=device, dtype=dtype))
    return {
        "seconds": found.seconds, "peak_bytes": found.peak_bytes, "free_bytes": found.free_bytes,
        "device": found.device, "dtype": found.unet_dtype, "width": task.width, "height": task.height,
        "steps": request.chosen_steps, "guidance_scale": request.chosen_scale, "reasons": list(found.reasons),
    }  # fmt: skip


def settled(pipeline: DiffusionPipeline, request: GenerateRequest, path: str) -> tuple[GenerateRequest, list[str]]:
    """Return the request with the checkpoint's default settings and size filled in, and notes. path: the model's."""
    request, notes = drafted(request, pipeline.parts, path)
    request = request.settled(pipeline.parts.settings)
    if request.image is not None:
        return request, notes
    width, height = pipeline.parts.size_of(request)
    return request.replace(width=width, height=height), notes


def key_of(pipeline: DiffusionPipeline, request: GenerateRequest) -> str:
    """Return the key of the image of a request for a single image."""
    numerics = {"version": NUMERICS, "device": pipeline.device.type, "dtype": dtype_name(pipeline.dtype)}
    source = "" if request.image is None else file_hash(Path(request.image))
    return image_key(salt_of(model_digest(pipeline.parts), numerics), source, canonical(request))


def is_of(path: Path, request: GenerateRequest) -> bool:
    """Return whether a file already contains the image of a request, as after a crash before the image was reported."""
    try:
        return path.is_file() and read_recipe(path)["request"] == json.loads(canonical(request))
    except (SfumatoError, OSError):
        return False


def write(path: Path, data: bytes) -> Path:
    """Write a file atomically, and return its path. An image of that name that differs stays: its LoRA has changed."""
    if path.is_file() and path.read_bytes() != data:
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(data).hexdigest()[:6]}")
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def enlarged(image: Image) -> Image:
    """Scale up a preview that has one pixel per latent, with smooth interpolation."""
    scale = min(8, PREVIEW_SIDE / max(image.size))
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def encoded(image: Image, kind: str) -> str:
    """Encode an image as a data URL."""
    image.save(stream := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
