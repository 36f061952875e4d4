"""`sfumato replay`: generates an image again from its recipe or from another program's metadata."""

from __future__ import annotations

import os
import re
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import options
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import expanded

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.cli.terminal import Terminal
    from sfumato.metadata.remember import Remembered
    from sfumato.pipelines import DiffusionPipeline
    from sfumato.request import GenerateRequest

__all__ = ["EXAMPLES", "replay"]

EXAMPLES = """\b
Examples:
  sfumato replay fox.png
  sfumato replay fox.png --device cpu --dtype bfloat16 --output fox-bf16.png
  sfumato replay fast-fox.png --exact
  sfumato replay of-another-program.png --model ./the-checkpoint"""


def replay(
    picture: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An unmodified image from Sfumato or another program.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The checkpoint, if it has moved; required for an image from another program.",
            autocompletion=options.complete_models,
        ),
    ] = None,
    refiner: Annotated[
        str | None, typer.Option(help="The refiner, if it has moved.", autocompletion=options.complete_models)
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="The VAE, if it has moved, or for an image from another program.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The input image, for an image from another program that used one.")
    ] = None,
    rng: Annotated[
        str | None,
        typer.Option(help="Random number generator for an image from another program, if the recorded one is wrong."),
    ] = None,
    lora_dir: options.LoraFolder = None,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: the original's.")] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Draw the exact image if --fast or weights in 8 bits drew this one."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the new image. Default: <image>-replay.png.")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate an image again and compare it with the original.

    Prints the difference as PSNR in dB. For an image from another program, also lists what cannot be reproduced.
    """
    from sfumato.cli.early import check_choices, check_picture

    check_picture(picture)
    check_choices(device, dtype=dtype)
    from sfumato.cli.terminal import Terminal
    from sfumato.images import auto_grid, open_image, psnr
    from sfumato.metadata.carriers import save_new_picture, save_picture
    from sfumato.metadata.remember import remember

    remembered, original = remember(picture), open_image(picture)
    recipe, path = remembered.recipe, _target(output, picture)
    terminal, how = Terminal(quiet=quiet), (model, device, dtype)
    if exact:
        recipe = _exact(recipe, picture)
    if recipe is None:
        request, pipeline, notes = _foreign(terminal, remembered, picture, how, image, rng, lora_dir, vae)
    else:
        if image is not None or rng is not None:
            raise UsageError(
                "--image and --rng are for images from other programs; the recipe in this one contains both"
            )
        (request, pipeline), notes = _own(terminal, recipe, picture, how, refiner, lora_dir, vae), []
    with terminal.steps("generating") as bar:
        result = pipeline.generate(request, bar.show)
    drawn = auto_grid(result.images) if recipe and recipe.get("grid") else result.images[0]
    likeness = _likeness(original, drawn) if recipe is None else psnr(original, drawn)
    told = result.recipes[0] if recipe is None else recipe | result.recipes[0] | {"request": recipe["request"]}
    written = (save_picture if overwrite else save_new_picture)(drawn, path, told)
    _report(written, likeness, None if recipe else notes, as_json=as_json)


def _exact(recipe: dict[str, Any] | None, picture: Path) -> dict[str, Any]:
    """Return the recipe without what makes it fast or small. Raises `UsageError` for an image drawn exactly."""
    light = [] if recipe is None else [one for one in ("model", "refiner") if recipe.get(one, {}).get("eight_bit")]
    if recipe is None or not ("fast" in recipe["request"] or light):
        raise UsageError(
            f"{picture} was not drawn with --fast or weights in 8 bits, so there is nothing to compare; drop --exact"
        )
    request = {name: one for name, one in recipe["request"].items() if name != "fast"}
    return recipe | {"request": request} | {one: recipe[one] | {"eight_bit": False} for one in light}


def _target(output: Path | None, picture: Path) -> Path:
    """Return the path of the new image. Raises an error if it cannot be written there or in that format."""
    from sfumato.files import check_writable
    from sfumato.metadata.formats import format_of

    path = output or picture.with_name(f"{picture.stem}-replay.png")
    format_of(path)
    check_writable(path.parent)
    return path


def _report(written: Path, likeness: float | None, lost: list[str] | None, *, as_json: bool) -> None:
    from sfumato.cli.terminal import print_json

    if not as_json:
        typer.echo(f"{written}\n{_said(likeness)}")
        return
    values = {"psnr_db": None if likeness in (None, inf) else likeness, "identical": likeness == inf}
    print_json({"image": str(written), **values, **({} if lost is None else {"not_honoured": lost})})


def _said(likeness: float | None) -> str:
    if likeness is None:
        return "the original has a different size, so the two cannot be compared"
    return "identical to the original" if likeness == inf else f"PSNR against the original: {likeness:.1f} dB"


def _likeness(original: Image, drawn: Image) -> float | None:
    """Return the PSNR, or None if the sizes differ, as when another program upscaled its image."""
    from sfumato.images import psnr

    return psnr(original, drawn) if original.size == drawn.size else None


def _own(
    terminal: Terminal,
    recipe: dict[str, Any],
    picture: Path,
    how: tuple[str | None, str | None, str | None],
    refiner: str | None,
    lora_dir: Path | None,
    vae: str | None,
) -> tuple[GenerateRequest, DiffusionPipeline]:
    """Return the request and the loaded pipeline, with the recipe's scheduler, for an image that Sfumato generated."""
    from sfumato.pipelines.recipe import checked

    request, scheduler = checked(recipe, picture)
    if lora_dir is not None and (request.adapters or request.embeddings):
        from sfumato.adapters.named import moved

        added = {"adapters": request.adapters, "embeddings": request.embeddings}
        request = request.replace(**{name: moved(files, lora_dir) for name, files in added.items()})
    if vae is not None:
        if request.vae is None:
            raise UsageError(f"{picture} was drawn with the model's own VAE; drop --vae")
        request = request.replace(vae=vae)
    _check_start(recipe)
    pipeline = _load(terminal, recipe, picture, *how)
    pipeline.scheduler = scheduler
    if "refiner" in recipe:
        named = {key: value for key, value in recipe.items() if key != "coreml"} | {"model": recipe["refiner"]}
        pipeline.refiner = _load(terminal, named, picture, refiner, *how[1:], "--refiner")
    return request.replace(scheduler=None), pipeline


def _foreign(
    terminal: Terminal,
    remembered: Remembered,
    picture: Path,
    how: tuple[str | None, str | None, str | None],
    image: Path | None,
    rng: str | None,
    lora_dir: Path | None,
    vae: str | None,
) -> tuple[GenerateRequest, DiffusionPipeline, list[str]]:
    """Return the request, the loaded pipeline and notes on what is ignored, for another program's image."""
    from sfumato.adapters.named import hashes_to, with_named_adapters
    from sfumato.cli.generate import load_model
    from sfumato.cli.terminal import say

    model, device, dtype = how
    if model is None:
        told = remembered.fields.get("Model")
        named = f" with {told[:200]!r}" if told else ""
        raise UsageError(f"{picture} was generated by {remembered.program}{named}; give that checkpoint with --model")
    changes = {
        key: value for key, value in (("image", image and str(image)), ("rng", rng), ("vae", vae)) if value is not None
    }
    folder = None if lora_dir is None else str(lora_dir)
    notes = list(remembered.notes)
    request = remembered.request.replace(**changes, lora_dir=folder)
    hashes = remembered.adapter_hashes
    request = with_named_adapters(request, hashes)
    for file in (Path(one.file) for one in request.adapters if hashes):
        if not any(hashes_to(file, one) for one in hashes.values()):
            notes.append(f"{file} has none of the hashes that the image names; it may be another adapter")
    pipeline = load_model(terminal, model, device=device, dtype=dtype, request=request)
    if pipeline.parts.family.encoders[0].layer != -1 and request.clip_skip is not None:
        # Other programs count from the last layer, and ignore clip skip for families that use a fixed other layer.
        request = request.replace(clip_skip=None, negative_clip_skip=None)
        notes.append(f"Clip skip is ignored, as other programs do for {pipeline.parts.family.title}")
    for note in () if terminal.quiet else notes:
        say(f"note: {note}")
    return request, pipeline, notes


def _check_start(recipe: dict[str, Any]) -> None:
    """Raise `UsageError` if an input image of this one is missing or has changed."""
    from sfumato.files import expanded, file_hash
    from sfumato.pipelines.recipe import pictures

    for name, given in pictures(recipe["request"]).items():
        file = expanded(given)
        if not os.path.isfile(file) or file_hash(file) != recipe[name]["sha256"]:
            what = "input image" if name == "image" else name
            raise UsageError(f"the {what} {given} is missing or has changed; restore it to replay")


def _load(
    terminal: Terminal,
    recipe: dict[str, Any],
    picture: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    option: str = "--model",
) -> DiffusionPipeline:
    """Load the checkpoint of an image. Unless the user names one, it is not downloaded.

    Raises `UsageError` if its weights differ.
    """
    from sfumato.cli.coreml_generate import replay_models
    from sfumato.cli.generate import load_model
    from sfumato.pipelines.recipe import weights_hash

    name, converted = model or recipe["model"]["name"], recipe.get("coreml")
    if converted is not None and (device, dtype) != (None, None):
        raise UsageError(f"{picture} was generated with Core ML models, which do not support --device and --dtype")
    try:
        if converted is not None:
            pipeline = replay_models(terminal, name, converted)
        else:
            precision, local = dtype or recipe["dtype"], model is None
            said, wishes = recipe["model"].get("options"), {"eight_bit": recipe["model"].get("eight_bit")}
            pipeline = load_model(
                terminal, name, device=device, dtype=precision, wishes=wishes, local_files_only=local, options=said
            )
    except CheckpointError as error:
        if model is not None or os.path.isdir(expanded(name)):
            raise
        fetch = f", or run 'sfumato download {name}'" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise CheckpointError(
            f"{picture} was generated with {name}, which was not found; give its new path with {option}{fetch}"
        ) from error
    if weights_hash(pipeline.parts) != recipe["model"]["weights"]:
        raise UsageError(
            f"the weights of {name} are not those that {picture} was generated with; give the right checkpoint "
            f"({option})"
        )
    return pipeline
