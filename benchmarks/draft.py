"""Drafts: SD-Turbo's, compared with one guided U-Net call, and the built-in model's, compared with its full image."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results import Result, seconds
from sfumato import AutoencoderTiny
from sfumato.bench import ours
from sfumato.bench.cases import Case, Machine
from sfumato.bench.inputs import PROMPT, TIMESTEP, call_inputs
from sfumato.bench.timing import alternate
from sfumato.pipelines import load
from sfumato.pipelines.guidance import Guidance
from sfumato.request import GenerateRequest
from sfumato.runtime.device import DTYPES

__all__ = ["draft"]

TINY = Path("out") / "benchmark-taesd"
APPLE = GenerateRequest(prompt="a red apple, 3d", seed=7)


def draft(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Measure SD-Turbo's draft in one step with a tiny decoder, from prompt to image, and the built-in model's."""
    if not TINY.is_dir():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoencoderTiny().save_pretrained(TINY)
    case = Case(name="", work="unet", device=machine.device, size=machine.size, dtype=machine.half)
    request = GenerateRequest(prompt=PROMPT, seed=0, width=machine.size, height=machine.size, draft=True, vae=str(TINY))
    pipeline = load(folder, device=case.device, dtype=DTYPES[case.dtype], request=request)
    pipeline.generate(request)
    inputs = call_inputs(case, folder)
    guidance = Guidance(unet=pipeline.unet, conditioning=ours.conditioning(inputs, pipeline), scale=ours.SCALE)
    calls = {
        "draft": _again(lambda: pipeline.generate(request)),
        "call": _again(torch.no_grad()(lambda: guidance(inputs.latents.to(pipeline.device), TIMESTEP))),
    }
    times = alternate(calls, runs)
    name = f"SD-Turbo's draft, {machine.size}², {case.dtype}, 1 step, tiny decoder"
    found = [Result.of_times(f"{name} (one guided U-Net call)", times["draft"], times["call"], 0.75)]
    stages = pipeline.generate(request).seconds
    print("of which " + ", ".join(f"{stage} {seconds(value)}" for stage, value in stages.items()), flush=True)
    small = load(device="cpu")
    pictures = {
        "draft": _again(lambda: small.generate(APPLE.replace(draft=True))),
        "whole": _again(lambda: small.generate(APPLE)),
    }
    times = alternate(pictures, max(runs, 5))
    what = "the built-in model's draft (its picture in 20 steps)"
    return [*found, Result.of_times(what, times["draft"], times["whole"])]


def _again(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function for the seconds of a second call. The first call after another kind packs the weights anew."""

    def run() -> float:
        call()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return run
