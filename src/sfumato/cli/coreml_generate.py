"""`sfumato coreml generate`: generates images with converted models, with our options or Apple's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import options
from sfumato.cli.drawing import base_path, check_early, draw
from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.coreml.pipeline import CoreMLPipeline

__all__ = ["EXAMPLES", "generate", "load_models", "replay_models"]

EXAMPLES = """\b
Examples:
  sfumato coreml generate "a red apple, 3d" -i coreml-built-in
  sfumato coreml generate "a fox" -i models/coreml-stable-diffusion-v1-4_original_packages --compute-unit CPU_ONLY
  sfumato coreml generate --prompt "a fox" -i packages -o images --seed 93 --rng numpy
  sfumato coreml generate "a watercolor of it" --resource-path Resources --image photo.jpg --strength 0.6"""

log = logging.getLogger("sfumato")

# Options of Apple's runners that are not supported, and why.
REFUSED = {
    "xl": "Stable Diffusion XL is not supported with Core ML yet, so --xl cannot be used",
    "sd3": "Stable Diffusion 3 is not supported, so --sd3 cannot be used",
    "controlnet": "ControlNet is not supported yet; drop --controlnet",
    "controlnet_inputs": "ControlNet is not supported yet; drop --controlnet-inputs",
    "use_multilingual_text_encoder": "the multilingual text encoder is part of Apple's systems; drop the option",
    "script": "--script is for the multilingual text encoder, which is part of Apple's systems; drop the option",
}


def generate(
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What the image should show.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt, under the name that Apple's Python runner uses.")
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--input", "-i", "--resource-path", help="A folder that contains packages or compiled models."
        ),
    ] = Path(),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--output-path",
            help="A PNG, JPEG or WebP file, or a folder. Default: a PNG named after the prompt.",
        ),
    ] = None,
    compute_unit: Annotated[
        str | None,
        typer.Option(
            "--compute-unit", "--compute-units",
            help="ALL, CPU_AND_GPU, CPU_ONLY or CPU_AND_NE. Default: ALL. Without Core ML, the first three use the "
            "CPU.",
        ),
    ] = None,
    model_version: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint the models were made from, a folder or hub id, if they do not name it. Only small "
            "files of it are read. Default: CompVis/stable-diffusion-v1-4."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-inference-steps", "--step-count",
            help="Denoising steps. Default: the model's own number, usually 50.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt. Default: the model's own value, usually 7.5."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", help="The seed; image i uses seed + i. Default: random (Apple's runner: 93)."),
    ] = None,
    rng: Annotated[
        str, typer.Option(help="Random number generator: torch, numpy as in Apple's runners, or cuda (nvidia).")
    ] = "torch",
    count: Annotated[int, typer.Option("--count", "--image-count", "-n", help="Number of images.")] = 1,
    scheduler: options.SchedulerName = None,
    image: Annotated[Path | None, typer.Option(help="An image to start from; cropped and resized to fit.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much to change that image, from 0 (not at all) to 1 (completely). Apple's runner: 0.5."),
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", "-W", help="Width in pixels. Must be the models' own size.")
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Height in pixels. Must be the models' own size.")
    ] = None,
    reduce_memory: Annotated[
        bool, typer.Option("--reduce-memory", help="Keep each model in memory only while it is needed.")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Use the portable runtime, even on macOS.")
    ] = False,
    model_sources: Annotated[
        str | None,
        typer.Option(help="packages or compiled, if a folder contains both. Default: detected."),
    ] = None,
    unet_batch_one: Annotated[
        bool, typer.Option("--unet-batch-one", help="Ignored; accepted for Apple's scripts. Detected from the models.")
    ] = False,
    disable_safety: Annotated[
        bool,
        typer.Option("--disable-safety", help="Ignored; accepted for Apple's scripts. There is no safety checker."),
    ] = False,
    overwrite: options.Overwrite = False,
    grid: Annotated[bool, typer.Option("--grid", help="Combine all images into one.")] = False,
    preview_every: Annotated[
        int,
        typer.Option(
            "--preview-every", "--save-every",
            help="Every N steps, show the unfinished image in <output>.preview.png.",
        ),
    ] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    xl: Annotated[bool, typer.Option("--xl", hidden=True)] = False,
    sd3: Annotated[bool, typer.Option("--sd3", hidden=True)] = False,
    controlnet: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    controlnet_inputs: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    use_multilingual_text_encoder: Annotated[
        bool, typer.Option("--use-multilingual-text-encoder", hidden=True)
    ] = False,
    script: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:  # fmt: skip
    """Generate images with Core ML models, on any system.

    Prints the path of each image. The file contains the recipe to generate it again.
    """
    refused = {
        "xl": xl, "sd3": sd3, "controlnet": controlnet, "controlnet_inputs": controlnet_inputs,
        "use_multilingual_text_encoder": use_multilingual_text_encoder, "script": script,
    }  # fmt: skip
    for name, value in refused.items():
        if value:
            raise UsageError(REFUSED[name])
    from sfumato.cli.early import check_folder
    from sfumato.cli.terminal import Terminal
    from sfumato.request import GenerateRequest

    terminal = Terminal(quiet=quiet)
    text = _prompt(words, prompt)
    request = GenerateRequest(
        prompt=text, negative_prompt=negative_prompt, seed=seed, rng=_rng(rng), count=count,
        scheduler=scheduler, width=width, height=height,
        image=None if image is None else str(image), strength=strength,
        steps=steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    base = base_path(output, text)
    check_early(request, base, preview_every)
    check_folder(folder)
    pipeline = load_models(
        terminal, folder,
        compute_unit=compute_unit, model_version=model_version, kind=model_sources, reduce_memory=reduce_memory,
        portable=portable,
    )  # fmt: skip
    draw(
        terminal, pipeline, request, base,
        preview_every=preview_every, grid=grid, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip


def load_models(terminal: Terminal, folder: Path, **options: Any) -> CoreMLPipeline:
    """Load a folder of converted models with a progress display; `options` are those of `load_pipeline`.

    The process belongs to this command, so it also uses as many threads as there are free cores.
    """
    import torch

    from sfumato.coreml.pipeline import load_pipeline
    from sfumato.runtime.facts import read_facts

    with terminal.working(f"loading {folder}"):
        pipeline = load_pipeline(folder, **options)
    torch.set_num_threads(read_facts("cpu").free_cores)
    return pipeline


def replay_models(terminal: Terminal, name: str, told: dict[str, Any]) -> CoreMLPipeline:
    """Load the models named in a recipe with its settings; on the CPU if this system lacks their compute unit."""
    from sfumato.coreml.backends import engine_for

    # Never download something because an image's metadata names it.
    options: dict[str, Any] = {"local_files_only": True}
    options |= {"portable": told["engine"] == "portable", "kind": str(told["kind"])}
    if "model_version" in told:
        options["model_version"] = str(told["model_version"])
    unit = str(told["compute_unit"])
    try:
        engine_for(unit, portable=options["portable"])
    except UsageError as error:
        log.warning("the recipe's compute unit became CPU_ONLY: %s", error)
        unit = "CPU_ONLY"
    return load_models(terminal, Path(name), compute_unit=unit, **options)


def _prompt(words: str | None, prompt: str | None) -> str:
    if words is not None and prompt is not None:
        raise UsageError("the prompt is given twice; drop --prompt")
    text = words if prompt is None else prompt
    if text is None:
        raise UsageError('the prompt is missing; give one: sfumato coreml generate "a red apple, 3d"')
    return text


def _rng(name: str) -> str:
    """Return the request's name for a generator; Apple's runners call CUDA's "nvidia"."""
    return {"nvidia": "cuda"}.get(name.lower(), name.lower())
