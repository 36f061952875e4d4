"""Calls of both libraries' pipelines, compared."""

from __future__ import annotations

import numpy as np
import torch

import sfumato
from support.compare import FLOAT32, distance, generator

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
PROMPTS = ["a photo of an astronaut", "the red heart"]


def change_scheduler(name: str, ours, theirs, **config) -> None:
    import diffusers

    ours.scheduler = getattr(sfumato, name).from_config(ours.scheduler.config, **config)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **config)


def compare(ours, theirs, *, seed: int | list[int] | None = 0, **call) -> None:
    """Both calls end in the same latents, and leave their generators at the same place.

    Guidance multiplies rounding, and DDIM's first step on random weights multiplies it once more: the reference's own
    float32 is then up to 1.2e-4 from the float64 result. There, ours must be about as near.
    """

    def generators():
        return [generator(s) for s in seed] if isinstance(seed, list) else generator(seed)

    mine, other = (None, None) if seed is None else (generators(), generators())
    call = {"output_type": "latent", "num_inference_steps": 3} | call
    a, b = ours(generator=mine, **call).images, theirs(generator=other, **call).images
    assert a.dtype == b.dtype == torch.float32
    error = distance(a, b)
    if seed is not None and FLOAT32 <= error < 2 * FLOAT32:
        exact = ours.to(torch.float64)(generator=generators(), **call).images
        ours.to(torch.float32)
        # Which of the two rounds more luckily depends on the processor and its number of threads.
        assert distance(a, exact) < min(FLOAT32, 2 * distance(b, exact))
    else:
        assert error < FLOAT32
    if seed is not None:
        lists = zip(mine, other, strict=True) if isinstance(seed, list) else [(mine, other)]
        assert all(torch.equal(x.get_state(), y.get_state()) for x, y in lists)


def picture(width: int = 16, height: int = 16, seed: int = 0):
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
