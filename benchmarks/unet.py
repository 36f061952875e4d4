"""One U-Net call and one whole picture: full-size Stable Diffusion 1.5, random weights that both libraries share."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.compare import Comparison, alternate

__all__ = ["picture", "unet_call"]

MODES = {
    "float32": (torch.float32, torch.contiguous_format),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "bfloat16 channels_last": (torch.bfloat16, torch.channels_last),
}


def unet_call(checkpoint: Path, mode: str, latent_size: int, runs: int) -> Comparison:
    """A call at the batch of two that guidance makes."""
    import diffusers

    import sfumato

    dtype, memory_format = MODES[mode]
    ours = sfumato.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=dtype)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=dtype)
    for model in (ours, theirs):
        model.to(memory_format=memory_format).eval()
    x = torch.randn(2, 4, latent_size, latent_size).to(dtype, memory_format=memory_format)
    context = torch.randn(2, 77, 768).to(dtype)

    @torch.no_grad()
    def call(model: torch.nn.Module) -> None:
        model(x, torch.tensor(500), encoder_hidden_states=context)

    name = f"U-Net call, {mode}, {8 * latent_size}²"
    return alternate(name, lambda: call(ours), lambda: call(theirs), runs)


def picture(checkpoint: Path, mode: str, size: int, steps: int, runs: int) -> Comparison:
    """A picture from words: text encoder, loop with guidance, VAE."""
    import diffusers

    import sfumato

    dtype, memory_format = MODES[mode]
    ours = sfumato.StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype, safety_checker=None)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=memory_format)

    def call(pipeline) -> None:
        generator = torch.Generator().manual_seed(0)
        pipeline("a fox", num_inference_steps=steps, height=size, width=size, generator=generator)

    return alternate(f"picture, {mode}, {size}², {steps} steps", lambda: call(ours), lambda: call(theirs), runs)
