"""`sfumato generate`: generates images from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import details, options
from sfumato.cli.controls import controls, fetch_networks, image_prompts
from sfumato.cli.drawing import adapter_file, base_path, check_early, draw, framing, mask_of, sized
from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline
    from sfumato.request import GenerateRequest

__all__ = ["EXAMPLES", "generate", "load_model"]

EXAMPLES = """\b
Examples:
  sfumato generate "a red apple, 3d"
  sfumato generate "a red apple, 3d" --draft
  sfumato generate "a lighthouse in fog" --model stable-diffusion-v1-5/stable-diffusion-v1-5
  sfumato generate "a fox" --model ./dreamshaper_8.safetensors
  sfumato generate "a fox" -m sd15 --steps 20 --scheduler "DPM++ 2M Karras"
  sfumato generate "a fox" -n 4 --grid -s 7 -o fox.png
  sfumato generate "a watercolor of it" --image photo.jpg --strength 0.6
  sfumato generate "a red hat" --image photo.jpg --mask hat.png --mask-edge 8
  sfumato generate "a wide beach" --image photo.jpg --extend left=256,right=256
  sfumato generate "a fox" --model ./sdxl --refiner ./sdxl-refiner
  sfumato generate "a fox" --model sd15 --vae ./vae-ft-mse-840000-ema-pruned.safetensors
  sfumato generate "a fox" -m sd15 --hires 1.5 --hires-strength 0.5
  sfumato generate "a fox" --lora watercolor.safetensors:0.8 --embedding my-style.safetensors
  sfumato generate "a fox" -m sd15 --control canny:photo.jpg:0.8 --controlnet ./control_v11p_sd15_canny"""


def generate(
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
    model: options.Model = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    prompt_2: Annotated[
        str | None, typer.Option(help="The prompt for the second text encoder, if there is one. Default: the prompt.")
    ] = None,
    negative_prompt_2: Annotated[
        str | None, typer.Option(help="The negative prompt for the second text encoder.")
    ] = None,
    prompt_syntax: Annotated[
        str,
        typer.Option(help="Prompt grammar: a1111, comfyui, compel (weights, any length) or plain (cut at 77 tokens)."),
    ] = "a1111",
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_rescale: Annotated[float, typer.Option(help="Reduces overexposure, 0 to 1.")] = 0.0,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="START,STOP", help="Apply guidance only in this part of the run, such as 0.2,0.8. Default: all."
        ),
    ] = None,
    guidance_sigmas: Annotated[
        str | None, typer.Option(metavar="MIN,MAX", help="Apply guidance only at these noise levels, such as 0.3,5.4.")
    ] = None,
    freeu: Annotated[
        str | None,
        typer.Option(metavar="B1,B2,S1,S2", help="Reweight skip connections (FreeU), such as 1.5,1.6,0.9,0.2."),
    ] = None,
    fast: Annotated[
        str | None,
        typer.Option(
            metavar="DB",
            help="Less work for an image that differs from the exact one, such as 30dB: a PSNR that is typically "
            "reached. Only for models that this was measured for. Default: exact.",
        ),
    ] = None,
    draft: options.Draft = False,
    seamless: Annotated[
        str | None, typer.Option(help="x, y or xy: make the image tile seamlessly along these axes.")
    ] = None,
    seed: options.Seed = None,
    rng: Annotated[
        str, typer.Option(help="Random number generator: torch, numpy as in Apple's runners, or cuda.")
    ] = "torch",
    count: options.Count = 1,
    scheduler: options.SchedulerName = None,
    eta: Annotated[float, typer.Option(help="Noise added by the ddim and tcd schedulers, 0 to 1.")] = 0.0,
    spacing: Annotated[
        str | None, typer.Option(help="One of A1111's noise schedules, such as karras. Default: the scheduler's own.")
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="How many of the text encoder's last layers to skip.")] = None,
    negative_clip_skip: Annotated[int | None, typer.Option(help="The same for the negative prompt.")] = None,
    width: options.Width = None,
    height: options.Height = None,
    original_size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT: the original image size given to the model (Stable Diffusion XL)."),
    ] = None,
    crop: Annotated[str | None, typer.Option(help="LEFT,TOP: the crop offset given to the model.")] = None,
    target_size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT: the target size given to the model.")] = None,
    aesthetic_score: Annotated[
        float | None, typer.Option(help="The aesthetic score given to the model, 1 to 10.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="'staged' keeps one network in memory at a time, 'none' keeps all of them. Default: depends on free "
            "memory."
        ),
    ] = None,
    eight_bit: Annotated[
        bool | None,
        typer.Option(
            "--eight-bit/--no-eight-bit",
            help="Keep the U-Net's weights in 8 bits: much less memory, a slightly different image. Default: only if "
            "nothing else fits.",
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Images per batch. Does not change the images. Default: as many as fit in memory."),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile. Default: only where it is faster.")
    ] = None,
    variant: options.Variant = None,
    family: options.Family = None,
    prediction_type: options.PredictionType = None,
    config: options.Config = None,
    image: Annotated[Path | None, typer.Option(help="An image to start from (image-to-image).")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much to change that image, from 0 (not at all) to 1 (completely). Default: 0.8, or 1 with a mask."
        ),
    ] = None,
    mask: options.MaskFile = None,
    extend: options.Extend = None,
    mask_edge: options.MaskEdge = None,
    mask_crop: options.MaskCrop = None,
    depth: options.DepthFile = None,
    image_guidance_scale: options.ImageGuidance = None,
    noise_level: options.NoiseLevel = None,
    hires: options.Hires = None,
    hires_upscaler: options.HiresUpscaler = None,
    hires_strength: Annotated[
        float | None, typer.Option(help="How much the second pass changes, 0 to 1. Default: 0.7.")
    ] = None,
    hires_steps: options.HiresSteps = None,
    hires_scheduler: options.HiresScheduler = None,
    hires_prompt: Annotated[str | None, typer.Option(help="A different prompt for the second pass.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
            help="Adapter (LoRA or related, safetensors) and its weight. Repeatable. Default weight: 1.",
        ),
    ] = None,
    lora_dir: options.LoraFolder = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(help="Textual inversion (safetensors); use its file name in the prompt. Repeatable."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Apply the known part of an adapter that has unknown keys.")
    ] = False,
    control: options.ControlPicture = None,
    controlnet: options.ControlNets = None,
    control_fit: options.ControlFit = "crop",
    keep_control: Annotated[
        bool, typer.Option("--keep-control", help="Also save the preprocessed control images.")
    ] = False,
    image_prompt: options.ImagePrompts = None,
    ip_adapter: options.IPAdapters = None,
    image_encoder: options.ImageEncoder = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            help="A second checkpoint that takes over for the last steps, such as the one for Stable Diffusion XL.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    refiner_start: Annotated[
        float | None, typer.Option(help="The fraction of the denoising done before it takes over. Default: 0.8.")
    ] = None,
    vae: options.Vae = None,
    output: options.OutputImage = None,
    overwrite: options.Overwrite = False,
    grid: Annotated[bool, typer.Option("--grid", help="Combine all images into one.")] = False,
    preview_every: Annotated[
        int, typer.Option(help="Every N steps, show the unfinished image in <output>.preview.png.")
    ] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate images from a prompt.

    Prints the path of each image. The file contains the recipe to generate it again.
    """
    from sfumato.adapters.named import with_named_adapters
    from sfumato.cli.early import check_choices, check_model
    from sfumato.cli.settings import chosen_model
    from sfumato.cli.terminal import Terminal
    from sfumato.request import EmbeddingFile, GenerateRequest

    terminal = Terminal(quiet=quiet)
    request = GenerateRequest(
        prompt=prompt, negative_prompt=negative_prompt, guidance_rescale=guidance_rescale, seed=seed, rng=rng,
        count=count, scheduler=scheduler, eta=eta, clip_skip=clip_skip, width=width, height=height,
        image=None if image is None else str(image), strength=strength, steps=steps, guidance_scale=guidance_scale,
        prompt_2=prompt_2, negative_prompt_2=negative_prompt_2, prompt_syntax=prompt_syntax, spacing=spacing,
        negative_clip_skip=negative_clip_skip, seamless=seamless, freeu=details.freeu(freeu),
        fast=details.fast(fast), draft=draft,
        guidance_interval=details.guidance_interval(guidance_interval, guidance_sigmas),
        hires=details.hires(
            hires, upscaler=hires_upscaler, strength=hires_strength, steps=hires_steps, scheduler=hires_scheduler,
            prompt=hires_prompt,
        ),
        framing=framing(original_size, crop, target_size, aesthetic_score),
        lora_dir=None if lora_dir is None else str(lora_dir),
        adapters=tuple(adapter_file(one, partial=partial) for one in lora or ()),
        embeddings=tuple(EmbeddingFile(file=one) for one in embedding or ()),
        depth=None if depth is None else str(depth), image_guidance_scale=image_guidance_scale, noise_level=noise_level,
        mask=mask_of(mask, extend, mask_edge, mask_crop),
        refiner=refiner, denoising_end=_taken_over(refiner, refiner_start), vae=vae,
        controls=controls(control or (), controlnet or (), control_fit),
        image_prompts=image_prompts(image_prompt or (), ip_adapter or (), image_encoder),
    )  # fmt: skip
    request = with_named_adapters(request)
    base = base_path(output, request.prompts[0])
    check_early(request, base, preview_every)
    wishes = {"once": True, "offload": offload, "eight_bit": eight_bit, "micro_batch": micro_batch, "compile": compile}
    check_choices(device, dtype=dtype, **wishes)
    model = chosen_model(model)
    check_model(model, request)
    if refiner is not None:
        check_model(refiner)
    fetch_networks(request)
    pipeline = load_model(
        terminal,
        model,
        device=device,
        dtype=dtype,
        variant=variant,
        request=sized(request),
        wishes=wishes,
        options={"family": family, "prediction_type": prediction_type, "config": config},
    )
    draw(
        terminal, pipeline, request, base,
        preview_every=preview_every, grid=grid, overwrite=overwrite, as_json=as_json, keep_control=keep_control,
    )  # fmt: skip


def _taken_over(refiner: str | None, start: float | None) -> float | None:
    if start is not None and refiner is None:
        raise UsageError("--refiner-start needs a refiner; give one with --refiner")
    return start


def load_model(
    terminal: Terminal,
    name: str,
    *,
    device: str | None,
    dtype: str | None,
    variant: str | None = None,
    request: GenerateRequest | None = None,
    wishes: dict[str, Any] | None = None,
    local_files_only: bool = False,
    options: dict[str, Any] | None = None,
) -> DiffusionPipeline:
    """Load a checkpoint by name, with a progress display.

    request: what is about to be generated. options: for a checkpoint file. The process belongs to this command, so it
    also uses as many threads as there are free cores.
    """
    import torch

    from sfumato.pipelines import load
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.source import open_source
    from sfumato.runtime.device import parse_device, parse_dtype

    on_cpu, precision = parse_device(device).type == "cpu", parse_dtype(dtype)
    # A download shows its own progress, so it comes before the spinner.
    source = open_source(name, ComponentFiles(variant), {"local_files_only": local_files_only}, options=options)
    if request is not None and request.refiner is not None:
        open_source(request.refiner, ComponentFiles(variant), {"local_files_only": local_files_only})
    with terminal.working(f"loading {name}"):
        pipeline = load(source, device=device, dtype=precision, request=request, **(wishes or {}))
    if pipeline.place.facts is not None and on_cpu:
        torch.set_num_threads(pipeline.place.facts.free_cores)
    return pipeline
