"""Shared by the commands that generate images: early checks, progress, file names and output."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sfumato.errors import UsageError
from sfumato.files import expanded

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline, Result
    from sfumato.pipelines.result import Step
    from sfumato.request import AdapterFile, Framing, GenerateRequest, Mask

__all__ = ["adapter_file", "base_path", "check_early", "draw", "framing", "mask_of", "sized"]

# What a run adds to its request: files with their hashes, and the methods that keep a promise.
GRID_ADDS = ("adapters", "embeddings", "fast", "vae_weights")


def framing(
    original_size: str | None, crop: str | None, target_size: str | None, aesthetic_score: float | None
) -> Framing:
    """Parse the framing options, as (height, width) and (top, left)."""
    from sfumato.request import Framing

    return Framing(
        original_size=_pair("--original-size", "1024x1024", original_size),
        crops_coords_top_left=_pair("--crop", "0,0", crop),
        target_size=_pair("--target-size", "1024x1024", target_size),
        aesthetic_score=aesthetic_score,
    )


def _pair(option: str, example: str, text: str | None) -> tuple[int, int] | None:
    """Parse an option's two numbers and swap them."""
    if text is None:
        return None
    found = re.fullmatch(r"(-?\d{1,8})[x,](-?\d{1,8})", text.strip())
    if found is None:
        raise UsageError(f"{option} must be two numbers such as {example}, not {text!r}")
    return int(found[2]), int(found[1])


def mask_of(file: Path | None, extend: str | None, edge: int | None, crop: int | None) -> Mask | None:
    """Parse `--mask`, `--extend` and their related options."""
    from sfumato.request import Mask

    if file is None and extend is None:
        if edge is not None or crop is not None:
            raise UsageError("--mask-edge and --mask-crop need a mask; give one with --mask or --extend")
        return None
    sides: dict[str, int] = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    for part in () if extend is None else extend.split(","):
        found = re.fullmatch(r"\s*(left|top|right|bottom)=(\d{1,8})\s*", part)
        if found is None:
            raise UsageError(f"--extend takes sides and pixels such as left=256,top=64, not {part!r}")
        sides[found[1]] = int(found[2])
    pixels: Any = tuple(sides.values())
    return Mask(file=None if file is None else str(file), extend=pixels, edge=edge, crop=crop)


def sized(request: GenerateRequest) -> GenerateRequest:
    """The request with the size of the image it starts from, so that the plan is made for that size."""
    if request.image is None:
        return request
    from sfumato.images import open_image  # imports NumPy, which requests without an image do not need

    width, height = open_image(request.image).size  # also if the size is known: a damaged file is refused here
    cropped = request.mask is not None and request.mask.crop is not None
    if request.width is not None or cropped:
        return request
    left, top, right, bottom = (0, 0, 0, 0) if request.mask is None else request.mask.extend
    width, height = width + left + right, height + top + bottom
    return request.replace(width=max(64, width // 64 * 64), height=max(64, height // 64 * 64))


def adapter_file(text: str, *, partial: bool) -> AdapterFile:
    """Parse `--lora FILE[:WEIGHT[:TEXT_WEIGHT]]`."""
    from sfumato.request import AdapterFile

    file, weights = text, []
    while len(weights) < 2 and not os.path.exists(expanded(file)) and ":" in file[2:]:  # a drive letter
        file, _, weight = file.rpartition(":")
        try:
            weights.insert(0, float(weight))
        except ValueError as error:
            raise UsageError(f"--lora takes FILE[:WEIGHT[:TEXT_WEIGHT]], and {weight!r} is not a number") from error
    weight, text_weight = (*weights, None, None)[:2]
    weight = 1.0 if weight is None else weight
    return AdapterFile(file=file, weight=weight, text_weight=text_weight, partial=partial)


def base_path(output: Path | None, prompt: str) -> Path:
    """Return the path of the first image: the given file, or a name made from the prompt in the given folder."""
    place = expanded(output or Path())
    if place.suffix and not os.path.isdir(place):  # unlike Path.is_dir, returns False if access is denied
        return place
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return place / f"{words or 'image'}.png"


def check_early(request: GenerateRequest, base: Path, preview_every: int) -> None:
    """Run all checks that need no model, the quickest first."""
    from sfumato.cli.early import check_picture
    from sfumato.files import check_writable
    from sfumato.metadata.formats import format_of
    from sfumato.schedulers.names import resolve

    texts = {"the prompt": request.prompt, "--negative-prompt": request.negative_prompt or ""}
    for name, text in texts.items():
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError(f"{name} contains bytes that are not valid UTF-8; type it again")
    if preview_every < 0:
        raise UsageError(f"--preview-every must be at least 0, not {preview_every}")
    format_of(base)
    for scheduler in (request.scheduler, request.hires and request.hires.scheduler):
        if scheduler is not None:
            resolve(scheduler)
    check_writable(base.parent, f"{base.stem}.preview-{2**20}.png")  # the longest name
    for file in request.pictures.values():
        check_picture(file)
    for given in (*request.controls, *request.image_prompts):
        check_picture(given.image)
    for added in (*request.adapters, *request.embeddings):
        _check_added(added.file)


def _check_added(file: str) -> None:
    from sfumato.adapters.files import read_stored

    read_stored(file, hashed=False)


def draw(
    terminal: Terminal,
    pipeline: DiffusionPipeline,
    request: GenerateRequest,
    base: Path,
    *,
    preview_every: int,
    grid: bool,
    overwrite: bool,
    as_json: bool,
    keep_control: bool = False,
) -> None:
    """Generate a request's images, write them, and print their paths or, as JSON, everything about them.

    keep_control: also save the preprocessed control images, next to the images.
    """
    from sfumato.cli.terminal import print_json, say

    result = _draw(pipeline, request, terminal, base.with_name(f"{base.stem}.preview.png"), preview_every)
    paths = _write(result, base, grid=grid, overwrite=overwrite)
    kept = _write_controls(result, base, overwrite=overwrite) if keep_control else []
    if as_json:
        print_json(_summary(result, paths) | ({"controls": list(map(str, kept))} if keep_control else {}))
        return
    for path in (*paths, *kept):
        typer.echo(path)
    if not terminal.quiet:
        say(f"seed {result.seeds[0]}, {sum(result.seconds.values()):.1f} s")


def _draw(
    pipeline: DiffusionPipeline, request: GenerateRequest, terminal: Terminal, preview: Path, every: int
) -> Result:
    from sfumato.metadata.carriers import save_new_picture, save_picture

    shown: Path | None = None  # set to a file of our own, which is deleted at the end
    with terminal.steps("generating") as bar:

        def on_step(step: Step) -> None:
            nonlocal shown
            bar.show(step)
            if every and step.number % every == 0 and step.number < step.total:
                picture = _in_grid(step.preview())
                shown = save_new_picture(picture, preview) if shown is None else save_picture(picture, shown)

        try:
            return pipeline.generate(request, on_step)
        finally:
            if shown is not None:
                shown.unlink(missing_ok=True)


def _write(result: Result, base: Path, *, grid: bool, overwrite: bool) -> list[Path]:
    from sfumato.metadata.carriers import save_new_picture, save_picture

    if grid:
        first = result.recipes[0]
        added = {key: value for key, value in first["request"].items() if key in GRID_ADDS}
        asked = result.request.replace(fast=None).to_dict()
        pictures = [(_in_grid(result.images), first | {"request": asked | added, "grid": True})]
    else:
        pictures = list(zip(result.images, result.recipes, strict=True))
    paths = []
    for number, (picture, recipe) in enumerate(pictures, start=1):
        if overwrite:
            replaced = base if number == 1 else base.with_name(f"{base.stem}-{number}{base.suffix}")
            paths.append(save_picture(picture, replaced, recipe))
        else:
            paths.append(save_new_picture(picture, base, recipe))
    return paths


def _write_controls(result: Result, base: Path, *, overwrite: bool) -> list[Path]:
    from sfumato.metadata.carriers import save_new_picture, save_picture

    paths = []
    for number, picture in enumerate(result.controls, start=1):
        name = base.with_name(f"{base.stem}.control{'' if number == 1 else f'-{number}'}.png")
        paths.append((save_picture if overwrite else save_new_picture)(picture, name))
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
