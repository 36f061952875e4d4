"""How a picture came to be, in words a program can repeat."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.pipelines.result import versions
from sfumato.runtime.device import dtype_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.models.base import Model
    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.run import Run
    from sfumato.request import GenerateRequest

__all__ = ["describe", "file_hash", "fingerprint", "weights_hash"]

# Values of each tensor that are looked at: enough to tell two trainings apart, few enough to cost milliseconds.
SAMPLES = 64


def describe(
    pipeline: DiffusionPipeline, run: Run, request: GenerateRequest, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A recipe for each picture: a request for it alone, and everything else its pixels depend on."""
    shared = {
        "model": {"name": pipeline.name, "weights": weights_hash(pipeline)},
        "scheduler": {"class": type(run.scheduler).__name__, "config": run.scheduler.config.to_dict()},
        "device": pipeline.device.type,
        "dtype": dtype_name(pipeline.dtype),
        "versions": versions(),
        "notes": list(run.notes),
    }
    if request.image is not None:
        shared["image"] = {"sha256": file_hash(Path(request.image).expanduser())}
    recipes = []
    for index, seed in enumerate(seeds):
        place = index // request.count
        negative = request.negative_prompt if request.negative_prompt is None else request.negative_prompts[place]
        alone = request.replace(prompt=request.prompts[place], negative_prompt=negative, seed=seed, count=1)
        recipes.append({"request": alone.to_dict() | {"seed": seed}, **shared})
    return recipes


def weights_hash(pipeline: DiffusionPipeline) -> str:
    """The hash of a whole checkpoint: that of its networks' fingerprints."""
    parts = [fingerprint(model) for model in (pipeline.text_encoder, pipeline.unet, pipeline.vae)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def fingerprint(model: Model) -> str:
    """A hash of names, shapes and the signs of a sample of all weights of a network.

    Signs survive every cast between precisions, so a checkpoint has one hash in all of them; another training flips
    some of the tens of thousands that are looked at.
    """
    if model.fingerprint is not None:
        return model.fingerprint
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        part = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(part.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
