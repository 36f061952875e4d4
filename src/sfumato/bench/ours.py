"""Sfumato as its users run it: everything follows the plan."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from sfumato.bench.inputs import PROMPT, TIMESTEP, Inputs, call_inputs
from sfumato.bench.timing import Clock, Timing
from sfumato.pipelines import load
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance
from sfumato.request import GenerateRequest
from sfumato.runtime.device import DTYPES, reused_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sfumato.bench.cases import Case
    from sfumato.pipelines import DiffusionPipeline

__all__ = ["call", "conditioning", "picture", "ready"]

SCALE = 7.5  # any value above 1: two predictions per call


def picture(case: Case, folder: Path) -> Callable[[int], Timing]:
    """Return a function that generates an image with at most the given number of steps."""
    request = _request(case)
    pipeline = load(folder, device=case.device, dtype=DTYPES[case.dtype], request=request)

    def draw(limit: int) -> Timing:
        clock = Clock(case.device, limit)
        steps = pipeline.stream(request)
        for step in steps:
            if clock.step(step.number, step.total) and step.number < step.total:
                steps.close()
                step.preview()
        return clock.stop()

    return draw


def call(case: Case, folder: Path) -> Callable[[], torch.Tensor]:
    """Return a function that calls the U-Net, including guidance, or the VAE's decoder."""
    pipeline = ready(case, folder)
    inputs = call_inputs(case, folder)
    latents = inputs.latents.to(pipeline.device)
    if case.work == "vae":
        plan = pipeline.place.plan(pipeline.parts, _request(case))
        kept = plan is not None and plan.keep_freed
        return lambda: _decode(pipeline, latents.to(pipeline.vae.dtype), kept)
    guidance = Guidance(unet=pipeline.unet, conditioning=conditioning(inputs, pipeline), scale=SCALE)
    return torch.no_grad()(lambda: guidance(latents, TIMESTEP))


def conditioning(inputs: Inputs, pipeline: DiffusionPipeline) -> Conditioning:
    """Return the inputs as the denoising loop passes them: in the U-Net's dtype, sizes in float32."""
    told = (inputs.embeds.to(pipeline.unet.dtype), inputs.pooled, inputs.sizes)
    embeds, pooled, sizes = (() if x is None else x.to(pipeline.device).chunk(2) for x in told)
    return Conditioning(embeds, tuple(x.to(pipeline.unet.dtype) for x in pooled), sizes)


@torch.no_grad()
def _decode(pipeline: DiffusionPipeline, latents: torch.Tensor, kept: bool) -> torch.Tensor:
    """Decode as in a run, including the memory settings."""
    with reused_memory() if kept else nullcontext():
        return pipeline.vae.decode(latents, return_dict=False)[0]


def ready(case: Case, folder: Path) -> DiffusionPipeline:
    """Return a pipeline whose network for the case is loaded, and optimized as planned."""
    request = _request(case)
    pipeline = load(folder, device=case.device, dtype=DTYPES[case.dtype], request=request)
    pipeline.place.bring(pipeline.parts, case.work, pipeline.place.plan(pipeline.parts, request), [])
    return pipeline


def _request(case: Case) -> GenerateRequest:
    return GenerateRequest(
        prompt=PROMPT,
        steps=case.steps,
        scheduler=case.scheduler,
        count=case.count,
        width=case.size,
        height=case.size,
        seed=0,
    )
