"""What the commands that draw have in common: checks beforehand, progress, names of files, and what is printed."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline, Result
    from sfumato.pipelines.result import Step
    from sfumato.request import GenerateRequest

__all__ = ["base_path", "check_early", "draw", "given"]


def given(**options: Any) -> dict[str, Any]:
    """The options that were not left out."""
    return {name: value for name, value in options.items() if value is not None}


def base_path(output: Path | None, prompt: str) -> Path:
    """Where the first picture goes: the file named, or a name made of the prompt in the folder named."""
    place = (output or Path()).expanduser()
    if place.suffix and not os.path.isdir(place):  # False, and no error, where one may not look
        return place
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return place / f"{words or 'picture'}.png"


def check_early(request: GenerateRequest, base: Path, preview_every: int) -> None:
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
) -> None:
    """Draw a request, write its pictures and print their paths, or all there is to say as JSON."""
    from sfumato.cli.terminal import print_json

    result = _draw(pipeline, request, terminal, base.with_name(f"{base.stem}.preview.png"), preview_every)
    paths = _write(result, base, grid=grid, overwrite=overwrite)
    if as_json:
        print_json(_summary(result, paths))
        return
    for path in paths:
        typer.echo(path)
    if not terminal.quiet:
        typer.echo(f"seed {result.seeds[0]}, {sum(result.seconds.values()):.1f} s", err=True)


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
