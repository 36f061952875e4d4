"""Weights in 8 bits compared with exact ones: time and error of a call, memory, and distance between the images."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from benchmarks.pictures import planned_and_held
from benchmarks.results import Result
from sfumato import GenerateRequest, load
from sfumato.bench.cases import Case, Machine
from sfumato.bench.inputs import TIMESTEP, call_inputs
from sfumato.bench.ours import SCALE, conditioning
from sfumato.bench.timing import alternate, timed
from sfumato.images import psnr
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.sizes import read_sizes

__all__ = ["eight_bit"]

PROMPTS = Path("recipes") / "mini" / "prompts.txt"


def eight_bit(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Measure a U-Net call, the peak memory of a command, and 64 images of the built-in model."""
    case = Case(name="", work="unet", device="cpu", dtype="float32", size=machine.size)
    calls = {name: _call(case, folder, light=name == "8 bits") for name in ("8 bits", "exact")}
    light, exact = (call() for call in calls.values())
    times = alternate({name: timed(call) for name, call in calls.items()}, runs)
    error = float((light - exact).norm() / exact.norm())
    calls.clear()
    near = _near()
    return [
        Result.of_times(f"U-Net call, {machine.size}², float32, 8 bits (exact)", times["8 bits"], times["exact"], 1.1),
        Result("its error, of the exact call's norm", f"{error:.4f}", "1", error),
        planned_and_held(folder, read_sizes(folder), machine.size, 1, "float32", light=True),
        Result(
            "PSNR of 64 images by the built-in model in 8 bits, median (least)",
            f"{median(near):.1f} dB",
            f"{min(near):.1f} dB",
            median(near) / min(near),
            len(near),
        ),
    ]


def _call(case: Case, folder: Path, *, light: bool):
    request = GenerateRequest(prompt="", steps=2, width=case.size, height=case.size)
    pipeline = load(folder, device="cpu", dtype=torch.float32, eight_bit=light)
    pipeline.place.bring(pipeline.parts, "unet", pipeline.place.plan(pipeline.parts, request), [])
    inputs = call_inputs(case, folder)
    guidance = Guidance(unet=pipeline.unet, conditioning=conditioning(inputs, pipeline), scale=SCALE)
    return torch.no_grad()(lambda: guidance(inputs.latents, TIMESTEP))


def _near() -> list[float]:
    """Return the PSNR of each image."""
    light, exact = (load(device="cpu", dtype=torch.float32, eight_bit=one) for one in (True, False))
    near: list[float] = []
    for index, prompt in enumerate(PROMPTS.read_text(encoding="utf-8").splitlines()[:64]):
        request = GenerateRequest(prompt=prompt, seed=1000 + index, **light.suggested)
        pair = (pipeline.generate(request).images[0] for pipeline in (light, exact))
        near.append(psnr(*pair))
    return near
