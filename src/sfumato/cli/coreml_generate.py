"""`sfumato coreml generate`: pictures drawn with converted models, in the words of Apple's two runners or in ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.drawing import base_path, check_early, draw, given
from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.coreml.pipeline import CoreMLPipeline

__all__ = ["EXAMPLES", "generate", "load_models", "replay_models"]

EXAMPLES = """\b
Examples:
  sfumato coreml generate "a red apple, 3d" -i coreml-built-in
  sfumato coreml generate "a fox" -i models/coreml-stable-diffusion-v1-4_original_packages --compute-unit CPU_ONLY
  sfumato coreml generate --prompt "a fox" -i packages -o pictures --seed 93 --rng numpy
  sfumato coreml generate "a watercolour of it" --resource-path Resources --image photo.jpg --strength 0.6"""

log = logging.getLogger("sfumato")

# What Apple's runners can be told and this one cannot do, and why.
REFUSED = {
    "xl": "Stable Diffusion XL cannot be drawn with; --xl is for its models",
    "sd3": "Stable Diffusion 3 cannot be drawn with; --sd3 is for its models",
    "controlnet": "there is no ControlNet here; leave --controlnet out",
    "controlnet_inputs": "there is no ControlNet here; leave --controlnet-inputs out",
    "use_multilingual_text_encoder": "the multilingual text encoder is part of Apple's systems; leave it out",
    "script": "--script is for the multilingual text encoder, which is part of Apple's systems; leave it out",
}


def generate(
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The same, as Apple's Python runner takes it.")] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--input", "-i", "--resource-path",
            help="The folder of packages or of compiled models, or one around it.",
        ),
    ] = Path(),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--output-path", help="A PNG file, or a folder; named after the prompt if left out."
        ),
    ] = None,
    compute_unit: Annotated[
        str | None,
        typer.Option(
            "--compute-unit", "--compute-units",
            help="ALL, CPU_AND_GPU, CPU_ONLY or CPU_AND_NE; all there are if left out. Without Core ML, the first "
            "three draw on the CPU.",
        ),
    ] = None,
    model_version: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint the models are of, a folder or hub id, where they do not say it; of it only small "
            "files are read. CompVis/stable-diffusion-v1-4 if left out."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-inference-steps", "--step-count",
            help="Denoising steps; 50, or what the model asks for, if left out.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How strongly to follow the prompt; 7.5, or what the model asks for, if left out."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", help="Picture i is drawn with seed + i; a random one if left out (Apple's: 93)."),
    ] = None,
    rng: Annotated[
        str, typer.Option(help="Where noise comes from: torch, as everywhere here, or numpy, as in Apple's runners.")
    ] = "torch",
    count: Annotated[int, typer.Option("--count", "--image-count", help="How many pictures.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="A name from 'sfumato schedulers', or as Apple's runners call them; the checkpoint's if left out."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from; cut and resized to fit.")] = None,
    strength: Annotated[float, typer.Option(help="How far to leave that picture, 0 to 1 (Apple's: 0.5).")] = 0.8,
    width: Annotated[int | None, typer.Option(help="Pixels; models have one size, and this must be it.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, likewise.")] = None,
    reduce_memory: Annotated[
        bool, typer.Option("--reduce-memory", help="Load each model for its own stage only.")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Compute with the portable runtime on macOS too.")
    ] = False,
    model_sources: Annotated[
        str | None, typer.Option(help="packages or compiled, where a folder has both; found out if left out.")
    ] = None,
    unet_batch_one: Annotated[
        bool, typer.Option("--unet-batch-one", help="Accepted for Apple's scripts; the model itself says it.")
    ] = False,
    disable_safety: Annotated[
        bool, typer.Option("--disable-safety", help="Accepted for Apple's scripts; there is no safety checker.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file; else the next free name is taken.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Put all pictures into one.")] = False,
    preview_every: Annotated[
        int,
        typer.Option(
            "--preview-every", "--save-every", help="Show the picture so far in <output>.preview.png every N steps."
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
    xl: Annotated[bool, typer.Option("--xl", hidden=True)] = False,
    sd3: Annotated[bool, typer.Option("--sd3", hidden=True)] = False,
    controlnet: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    controlnet_inputs: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    use_multilingual_text_encoder: Annotated[
        bool, typer.Option("--use-multilingual-text-encoder", hidden=True)
    ] = False,
    script: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:  # fmt: skip
    """Draw pictures with Core ML models, on any system. Prints the path of each; the PNG carries its recipe."""
    refused = {
        "xl": xl, "sd3": sd3, "controlnet": controlnet, "controlnet_inputs": controlnet_inputs,
        "use_multilingual_text_encoder": use_multilingual_text_encoder, "script": script,
    }  # fmt: skip
    for name, value in refused.items():
        if value:
            raise UsageError(REFUSED[name])
    from sfumato.cli.terminal import Terminal
    from sfumato.request import GenerateRequest

    terminal = Terminal(quiet=quiet)
    text = _prompt(words, prompt)
    asked = given(steps=steps, guidance_scale=guidance_scale)
    request = GenerateRequest(
        prompt=text, negative_prompt=negative_prompt, seed=seed, rng=_rng(rng), count=count,
        scheduler=_scheduler(scheduler), width=width, height=height,
        image=None if image is None else str(image), strength=strength, **asked,
    )  # fmt: skip
    base = base_path(output, text)
    check_early(request, base, preview_every)
    pipeline = load_models(
        terminal, folder,
        compute_unit=compute_unit, model_version=model_version, kind=model_sources, reduce_memory=reduce_memory,
        portable=portable,
    )  # fmt: skip
    request = request.replace(**pipeline.suggested | asked)
    draw(
        terminal, pipeline, request, base,
        preview_every=preview_every, grid=grid, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip


def load_models(terminal: Terminal, folder: Path, **options: Any) -> CoreMLPipeline:
    """Load a folder of converted models, showing that it is being done; `options` are those of `load_pipeline`.

    The process is this command's own, so it also computes with as many threads as there are cores to run them.
    """
    import torch

    from sfumato.coreml.pipeline import load_pipeline
    from sfumato.runtime.facts import read_facts

    with terminal.working(f"loading {folder}"):
        pipeline = load_pipeline(folder, **options)
    torch.set_num_threads(read_facts("cpu").free_cores)
    return pipeline


def replay_models(terminal: Terminal, name: str, told: dict[str, Any]) -> CoreMLPipeline:
    """The models that a recipe names, with what it tells of them; on the CPU where this system lacks their unit."""
    from sfumato.coreml.backends import engine_for

    options: dict[str, Any] = {"portable": told["engine"] == "portable", "kind": str(told["kind"])}
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
        raise UsageError("the prompt is given twice; leave out --prompt")
    text = words if prompt is None else prompt
    if text is None:
        raise UsageError('there is nothing to draw; say what: sfumato coreml generate "a red apple, 3d"')
    return text


def _rng(name: str) -> str:
    if name.lower() in ("nvidia", "cuda"):
        raise UsageError("the noise of NVIDIA's generator is not drawn here; use --rng torch or --rng numpy")
    return name.lower()


def _scheduler(name: str | None) -> str | None:
    """A name that a request takes: Apple's are the classes' without "Scheduler", or pndm and dpmpp."""
    if name is None:
        return None
    from sfumato.schedulers.names import NAMES

    if name.lower() == "dpmpp":
        return "dpmpp_2m"
    classes = {alias.class_name for alias in NAMES.values()}
    return f"{name}Scheduler" if f"{name}Scheduler" in classes else name
