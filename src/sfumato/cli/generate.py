"""`sfumato generate`: pictures from words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.drawing import base_path, check_early, draw, given

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline
    from sfumato.request import GenerateRequest

__all__ = ["EXAMPLES", "generate", "load_model"]

EXAMPLES = """\b
Examples:
  sfumato generate "a red apple, 3d"
  sfumato generate "fog" --model stable-diffusion-v1-5/stable-diffusion-v1-5
  sfumato generate "a fox" --steps 20 --scheduler dpmpp_2m_karras
  sfumato generate "a fox" --count 4 --grid --seed 7 --output fox.png
  sfumato generate "a watercolour of it" --image photo.jpg --strength 0.6"""


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder or hub id; the built-in small model if left out.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; 50, or what the model asks for, if left out.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How strongly to follow the prompt; 1 or less turns guidance off. 7.5, or what the model asks for, "
            "if left out."
        ),
    ] = None,
    guidance_rescale: Annotated[float, typer.Option(help="Tame over-exposure, 0 to 1.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Picture i is drawn with seed + i; a random one if left out.")
    ] = None,
    rng: Annotated[
        str, typer.Option(help="Where noise comes from: torch, or numpy as in Apple's Core ML runners.")
    ] = "torch",
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A name from 'sfumato schedulers'; the checkpoint's own if left out.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Noise of the ddim scheduler, 0 to 1.")] = 0.0,
    clip_skip: Annotated[int | None, typer.Option(help="Leave out this many last layers of the text encoder.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the checkpoint's own size if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the checkpoint's own size if left out.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; what is fast and safe if left out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best one present if left out.")] = None,
    offload: Annotated[
        str | None, typer.Option(help="staged: networks take turns in memory; none. As memory asks if left out.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Pictures computed together; what fits if left out. Changes no picture.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile; where it pays if left out.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float, typer.Option(help="How far to leave that picture, 0 to 1.")] = 0.8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A PNG file, or a folder; named after the prompt if left out.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file; else the next free name is taken.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Put all pictures into one.")] = False,
    preview_every: Annotated[
        int, typer.Option(help="Show the picture so far in <output>.preview.png every N steps.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Draw pictures from words. Prints the path of each; the PNG carries the recipe to draw it again."""
    from sfumato.cli.terminal import Terminal
    from sfumato.request import GenerateRequest

    terminal = Terminal(quiet=quiet)
    asked = given(steps=steps, guidance_scale=guidance_scale)
    request = GenerateRequest(
        prompt=prompt, negative_prompt=negative_prompt, guidance_rescale=guidance_rescale, seed=seed, rng=rng,
        count=count, scheduler=scheduler, eta=eta, clip_skip=clip_skip, width=width, height=height,
        image=None if image is None else str(image), strength=strength, **asked,
    )  # fmt: skip
    base = base_path(output, prompt)
    check_early(request, base, preview_every)
    wishes = {"once": True, "offload": offload, "micro_batch": micro_batch, "compile": compile}
    pipeline = load_model(
        terminal,
        model,
        device=device,
        dtype=dtype,
        variant=variant,
        request=_sized(request),
        asked=asked,
        wishes=wishes,
    )
    request = request.replace(**pipeline.suggested | asked)
    draw(
        terminal, pipeline, request, base,
        preview_every=preview_every, grid=grid, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip


def load_model(
    terminal: Terminal,
    model: str | None,
    *,
    device: str | None,
    dtype: str | None,
    variant: str | None = None,
    request: GenerateRequest | None = None,
    asked: dict[str, Any] | None = None,
    wishes: dict[str, Any] | None = None,
) -> DiffusionPipeline:
    """Load a checkpoint by name, or the built-in one (None or "built-in"), showing that it is being done.

    request: what is about to be drawn; the checkpoint's suggestions hold in it but where `asked` says otherwise.
    The process is this command's own, so it also computes with as many threads as there are cores to run them.
    """
    import torch

    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.checkpoints.locate import locate_folder
    from sfumato.checkpoints.suggested import suggested_settings
    from sfumato.pipelines import load
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.runtime.device import parse_device, parse_dtype

    place, precision = parse_device(device), parse_dtype(dtype)
    name = model or BUILT_IN
    # A download shows its own progress, so it comes before the spinner.
    folder = locate_folder(name, ComponentFiles(variant).select)
    if request is not None:
        request = request.replace(**suggested_settings(folder) | (asked or {}))
    with terminal.working(f"loading {name}"):
        pipeline = load(folder, device=str(place), dtype=precision, variant=variant, request=request, **(wishes or {}))
    if pipeline.place.facts is not None and place.type == "cpu":
        torch.set_num_threads(pipeline.place.facts.free_cores)
    pipeline.name = name
    return pipeline


def _sized(request: GenerateRequest) -> GenerateRequest:
    """The request with the size of the picture it starts from, so that the plan is made for that."""
    from sfumato.images import open_image

    if request.image is None or request.width is not None:
        return request
    width, height = open_image(request.image).size
    return request.replace(width=max(64, width // 64 * 64), height=max(64, height // 64 * 64))
