"""On an NVIDIA GPU: guided steps per second and whole pictures, against the reference library eager and compiled.

Networks of full size, with random weights made on the GPU; no files. Needs no idle processor, only an idle GPU.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sfumato.families import FAMILIES
from sfumato.request import GenerateRequest

__all__ = ["cuda", "pipeline_of"]

NOTHING = "no CUDA device here: nothing was measured"
HEAD = "| what | sfumato | compared with | ratio | target |\n|---|---|---|---|---|"
SMALL = "SD 1.5, 512², steps/s, batch"
PROMPT, SCHEDULER, STEPS = "portrait photo of an old warrior chief", "dpmpp_2m", 30
# Seconds on an H100, float16, by Stability AI and NVIDIA.
TENSORRT = 1.471
# Of a run's steps, the first are launched one by one and recorded; the rest are counted.
FIRST = 4
COUNTS = (8, 1)
# A compiler that searches all kernels takes minutes; this is what the reference's guide begins with.
COMPILE = "reduce-overhead"
# Start no compilation after this many seconds.
LAST_START = 105.0


def cuda(began: float | None = None) -> int:
    """Print the table row by row, and return the exit status."""
    if not torch.cuda.is_available():
        print(NOTHING)
        return 1
    began = time.perf_counter() if began is None else began
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16, {SCHEDULER}"
    print(f"{where}; steps with guidance per second\n\n{HEAD}")
    pipeline = pipeline_of("sd15", "cuda", torch.float16)
    ours = {count: guided_steps(pipeline, count, 512) for count in COUNTS}
    _row(f"{SMALL} 1", ours[1], least=150)
    _row(f"{SMALL} 8", ours[8])
    _row("SD 1.5, 512², a picture of 20 steps, s", pictures(pipeline, 512, 20))
    del pipeline
    _release()
    pipeline = pipeline_of("sdxl", "cuda", torch.float16)
    seconds = pictures(pipeline, 1024, STEPS)
    _row(f"SDXL, 1024², a picture of {STEPS} steps, s (TensorRT, as published)", seconds, TENSORRT, most=TENSORRT)
    _row("SDXL, 1024², batch 1", guided_steps(pipeline, 1, 1024))
    del pipeline
    _release()
    _against_reference(ours, began)
    print(f"\n{time.perf_counter() - began:.0f} s in all", flush=True)
    return 0


def _against_reference(ours: dict[int, float], began: float) -> None:
    """Print the rows that compare with the reference: first eager, then compiled, which takes longer."""
    try:
        reference = _reference()
    except ImportError:
        print("| (the reference library is not installed) | | | | |")
        return
    for count in COUNTS:
        _row(f"{SMALL} {count} (diffusers, channels last)", ours[count], _rate(*_loop(reference, reference, count)))
    reference.fuse_qkv_projections()
    for count in COUNTS:
        what, start = f"{SMALL} {count} (diffusers, channels last, compiled: {COMPILE})", time.perf_counter()
        if start - began > LAST_START:
            print(f"| {what} | {ours[count]:.1f} | no time left | | |")
            continue
        torch._dynamo.reset()
        compiled = torch.compile(reference, mode=COMPILE, fullgraph=True, dynamic=False)
        _row(what, ours[count], _rate(*_loop(reference, compiled, count)), least=1.3 if count == 8 else None)
        print(f"  compiled and measured in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        del compiled


def pipeline_of(family: str, device: str, dtype: torch.dtype) -> Any:
    """Return a full-size pipeline of a family, with random weights made on the device."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from random_checkpoint import SIZES, parts_of

    import sfumato

    row = SIZES[family]
    with tempfile.TemporaryDirectory(prefix="sfumato-benchmarks-") as folder:
        parts = parts_of(Path(folder), row, dtype, device=device)
    parts["vae"].to(torch.bfloat16 if dtype == torch.float16 else dtype)  # as the numeric policy loads it
    return getattr(sfumato, row.pipeline)(**parts)


def _request(count: int, side: int, steps: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=PROMPT, steps=steps, scheduler=SCHEDULER, count=count, width=side, height=side, seed=0
    )


def guided_steps(pipeline: Any, count: int, side: int, steps: int = STEPS) -> float:
    """Return the steps per second, from the median time between events on the device, without the first steps."""
    marks = []
    stream = pipeline.stream(_request(count, side, steps))
    for step in stream:
        marks.append(_mark())
        if step.number == step.total:
            break
    stream.close()
    return _per_second(marks[FIRST:])


def pictures(pipeline: Any, side: int, steps: int, runs: int = 3) -> float:
    """Return the median seconds from prompt to image, after a warm-up."""
    times = []
    for _ in range(1 + runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        pipeline.generate(_request(1, side, steps))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def _reference() -> Any:
    """Return the reference's U-Net of Stable Diffusion 1.5, channels last."""
    import diffusers

    values = {name: value for name, value in FAMILIES["sd15"].unet.items() if not name.startswith("_")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            unet: Any = diffusers.UNet2DConditionModel(**values)
    finally:
        torch.set_default_dtype(before)
    return unet.eval().to(memory_format=torch.channels_last)


def _loop(unet: Any, called: Any, count: int) -> tuple[Callable[[Any, torch.Tensor], torch.Tensor], torch.Tensor]:
    """Return a function for one guided step, as in the reference's pipeline, and the first latents."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(STEPS, device="cuda")
    unet.scheduler = scheduler
    states = torch.randn(2 * count, 77, 768, device="cuda", dtype=torch.float16)

    def step(t: Any, x: torch.Tensor) -> torch.Tensor:
        output = called(scheduler.scale_model_input(torch.cat([x, x]), t), t, states, return_dict=False)[0]
        without, told = output.chunk(2)
        return scheduler.step(without + 7.5 * (told - without), t, x, return_dict=False)[0]

    step.timesteps = scheduler.timesteps  # pyright: ignore[reportFunctionMemberAccess]
    return step, torch.randn(count, 4, 64, 64, device="cuda", dtype=torch.float16)


@torch.no_grad()
def _rate(step: Any, x: torch.Tensor) -> float:
    """Return the steps per second of the reference's loop, measured like ours."""
    marks = []
    for t in step.timesteps:
        x = step(t, x)
        marks.append(_mark())
    return _per_second(marks[FIRST:])


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _per_second(marks: list[torch.cuda.Event]) -> float:
    torch.cuda.synchronize()
    return 1e3 / median(one.elapsed_time(other) for one, other in pairwise(marks))


def _row(
    what: str, ours: float, theirs: float | None = None, *, least: float | None = None, most: float | None = None
) -> None:
    """Print one row. least: lower bound of the ratio, or else of our value; most: upper bound of our value."""
    value = ours if theirs is None or most is not None else ours / theirs
    missed = (least is not None and value < least) or (most is not None and value > most)
    words = f"≥ {least:g}" if least is not None else f"≤ {most:g} s" if most is not None else ""
    told = " | " if theirs is None else f"{theirs:.4g} | {ours / theirs:.2f}"
    print(f"| {what} | {ours:.4g} | {told} | {words}{', missed' if missed else ''} |", flush=True)


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
