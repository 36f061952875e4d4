"""The reference library, `diffusers`, at its defaults and at its best. Only this module imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sfumato.bench.inputs import PROMPT, TIMESTEP, call_inputs
from sfumato.bench.timing import Clock, Timing
from sfumato.pipelines.components import read_index
from sfumato.runtime.device import DTYPES
from sfumato.schedulers.names import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sfumato.bench.cases import Case

__all__ = ["call", "picture"]


def picture(case: Case, folder: Path) -> Callable[[int], Timing]:
    """Return a function that generates an image with at most the given number of steps."""
    import diffusers as library

    diffusers: Any = library  # its type stubs lack the names that it loads lazily
    # The safety checker is not part of the measurement.
    nothing = {part: None for part in ("safety_checker", "feature_extractor") if part in read_index(folder)}
    dtype = DTYPES[case.dtype]
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=dtype, **nothing)
    pipeline.to(case.device)
    pipeline.set_progress_bar_config(disable=True)
    if case.scheduler is not None:
        class_name, preset = resolve(case.scheduler)
        pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **preset)
    if case.tuned:
        for model in (pipeline.unet, pipeline.vae):
            _tune(model, case.device)

    def draw(limit: int) -> Timing:
        clock = Clock(case.device, limit)

        def on_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # The library's own way to stop: the remaining steps do nothing, and the latents are decoded.
            pipeline._interrupt = clock.step(index + 1, pipeline.num_timesteps)
            return {}

        pipeline(
            PROMPT,
            num_inference_steps=case.steps,
            height=case.size,
            width=case.size,
            num_images_per_prompt=case.count,
            generator=[torch.Generator().manual_seed(seed) for seed in range(case.count)],
            callback_on_step_end=on_step,
        )
        return clock.stop()

    return draw


def call(case: Case, folder: Path) -> Callable[[], torch.Tensor]:
    """Return a function that calls the U-Net with a batch of two, as guidance does, or the VAE's decoder."""
    import diffusers as library

    diffusers: Any = library
    name = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[case.work]
    dtype = DTYPES[case.dtype]
    model = getattr(diffusers, name).from_pretrained(folder, subfolder=case.work, torch_dtype=dtype)
    model.to(case.device).eval()
    if case.tuned:
        _tune(model, case.device)
    inputs = call_inputs(case, folder)
    latents, embeds = (x.to(case.device, dtype) for x in (inputs.latents, inputs.embeds))
    if case.work == "vae":
        return torch.no_grad()(lambda: model.decode(latents, return_dict=False)[0])
    pair, timestep = torch.cat([latents, latents]), torch.tensor(TIMESTEP, device=case.device)
    added = {name: x.to(case.device, dtype) for name, x in inputs.added.items()}
    return torch.no_grad()(lambda: model(pair, timestep, embeds, added_cond_kwargs=added, return_dict=False)[0])


def _tune(model: Any, device: str) -> None:
    """Apply the guides' settings besides half precision: channels last; on CUDA also fused projections and compile."""
    model.to(memory_format=torch.channels_last)
    if device != "cuda":
        return
    model.fuse_qkv_projections()
    if hasattr(model, "decode"):
        model.decode = torch.compile(model.decode, mode="max-autotune", fullgraph=True)
    else:
        model.compile(mode="max-autotune", fullgraph=True)
