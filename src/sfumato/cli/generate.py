"""`sfumato generate`: pictures from words."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline, Result
    from sfumato.pipelines.result import Step
    from sfumato.request import GenerateRequest

__all__ = ["EXAMPLES", "generate", "given", "load_model"]

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
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.request import GenerateRequest

    terminal = Terminal(quiet=quiet)
    asked = given(steps=steps, guidance_scale=guidance_scale)
    request = GenerateRequest(
        prompt=prompt, negative_prompt=negative_prompt, guidance_rescale=guidance_rescale, seed=seed, count=count,
        scheduler=scheduler, eta=eta, clip_skip=clip_skip, width=width, height=height,
        image=None if image is None else str(image), strength=strength, **asked,
    )  # fmt: skip
    base = _base_path(output, prompt)
    _check_early(request, base, preview_every)
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
    result = _draw(pipeline, request, terminal, base.with_name(f"{base.stem}.preview.png"), preview_every)
    paths = _write(result, base, grid=grid, overwrite=overwrite)
    if as_json:
        print_json(_summary(result, paths))
        return
    for path in paths:
        typer.echo(path)
    if not quiet:
        typer.echo(f"seed {result.seeds[0]}, {sum(result.seconds.values()):.1f} s", err=True)


def given(**options: Any) -> dict[str, Any]:
    """The options that were not left out."""
    return {name: value for name, value in options.items() if value is not None}


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


def _check_early(request: GenerateRequest, base: Path, preview_every: int) -> None:
    """What can be known to be wrong before a model is loaded, the quickest to find out first."""
    from sfumato.files import check_writable
    from sfumato.schedulers.names import resolve

    texts = {"the prompt": request.prompt, "--negative-prompt": request.negative_prompt or ""}
    for name, text in texts.items():
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError(f"{name} holds bytes that are no UTF-8 text; type it again")
    if preview_every < 0:
        raise UsageError(f"--preview-every must be at least 0, not {preview_every}")
    if base.suffix.lower() != ".png":
        raise UsageError(f"pictures are written as PNG, so --output must end in .png, not {base.suffix}")
    if request.scheduler is not None:
        resolve(request.scheduler)
    check_writable(base.parent)
    if request.image is not None:
        from sfumato.images import open_image

        open_image(request.image)


def _sized(request: GenerateRequest) -> GenerateRequest:
    """The request with the size of the picture it starts from, so that the plan is made for that."""
    from sfumato.images import open_image

    if request.image is None or request.width is not None:
        return request
    width, height = open_image(request.image).size
    return request.replace(width=max(64, width // 64 * 64), height=max(64, height // 64 * 64))


def _draw(
    pipeline: DiffusionPipeline, request: GenerateRequest, terminal: Terminal, preview: Path, every: int
) -> Result:
    from sfumato.images import next_free, save_png

    preview = next_free(preview)  # never a file of the user's, as it goes when the drawing ends
    with terminal.steps("drawing") as bar:

        def on_step(step: Step) -> None:
            bar.show(step)
            if every and step.number % every == 0 and step.number < step.total:
                save_png(_in_grid(step.preview()), preview)

        try:
            return pipeline.generate(request, on_step)
        finally:
            preview.unlink(missing_ok=True)


def _base_path(output: Path | None, prompt: str) -> Path:
    """Where the first picture goes: the file named, or a name made of the prompt in the folder named."""
    place = (output or Path()).expanduser()
    if place.suffix and not os.path.isdir(place):  # False, and no error, where one may not look
        return place
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return place / f"{words or 'picture'}.png"


def _write(result: Result, base: Path, *, grid: bool, overwrite: bool) -> list[Path]:
    from sfumato.images import next_free, save_png

    if grid:
        pictures = [(_in_grid(result.images), {**result.recipes[0], "request": result.request.to_dict(), "grid": True})]
    else:
        pictures = list(zip(result.images, result.recipes, strict=True))
    paths = []
    for number, (picture, recipe) in enumerate(pictures, start=1):
        replaced = base if number == 1 else base.with_name(f"{base.stem}-{number}{base.suffix}")
        paths.append(save_png(picture, replaced if overwrite else next_free(base), recipe))
    return paths


def _in_grid(images: list[Any]) -> Any:
    from sfumato.images import auto_grid

    return auto_grid(images)


def _summary(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "images": [str(path) for path in paths],
        "seeds": list(result.seeds),
        "request": result.request.to_dict(),
        "recipe": {key: value for key, value in result.recipes[0].items() if key != "request"},
        "notes": list(result.notes),
        "seconds": result.seconds,
        "plan": None if result.plan is None else dataclasses.asdict(result.plan),
    }
