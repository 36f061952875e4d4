"""`sfumato replay`: a picture again, from the recipe it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.errors import UsageError

__all__ = ["EXAMPLES", "replay"]

EXAMPLES = """Examples:

sfumato replay fox.png

sfumato replay fox.png --device cpu --dtype bfloat16 --output fox-bf16.png"""


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that Sfumato wrote.")],
    model: Annotated[str | None, typer.Option(help="Where the checkpoint is now, if not where it was.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best one present if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; the original's if left out.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it; <picture>-replay.png if left out.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file; else the next free name is taken.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Draw a picture again and say how close it comes to the original (PSNR in dB)."""
    from sfumato.cli.generate import load_model
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.images import auto_grid, next_free, open_image, psnr, read_recipe, save_png
    from sfumato.pipelines.components import scheduler_from_recipe
    from sfumato.pipelines.recipe import weights_hash
    from sfumato.request import GenerateRequest

    recipe, original = read_recipe(picture), open_image(picture)
    request = GenerateRequest.from_dict(recipe["request"])
    _check_image(recipe)
    terminal = Terminal(quiet=quiet)
    pipeline = load_model(terminal, model or recipe["model"]["name"], device=device, dtype=dtype or recipe["dtype"])
    if weights_hash(pipeline) != recipe["model"]["weights"]:
        raise UsageError(
            f"the weights of {pipeline.name} are not those {picture} was drawn with; give the right ones with --model"
        )
    pipeline.scheduler = scheduler_from_recipe(recipe["scheduler"]["class"], recipe["scheduler"]["config"])
    with terminal.steps("drawing") as bar:
        result = pipeline.generate(request.replace(scheduler=None), bar.show)
    image = auto_grid(result.images) if recipe.get("grid") else result.images[0]
    path = output or picture.with_name(f"{picture.stem}-replay.png")
    written = save_png(
        image, path if overwrite else next_free(path), recipe | result.recipes[0] | {"request": recipe["request"]}
    )
    likeness = psnr(original, image)
    if as_json:
        print_json(
            {
                "image": str(written),
                "psnr_db": None if likeness == float("inf") else likeness,
                "identical": likeness == float("inf"),
            }
        )
        return
    typer.echo(written)
    typer.echo(
        "identical to the original" if likeness == float("inf") else f"PSNR against the original: {likeness:.1f} dB"
    )


def _check_image(recipe: dict[str, Any]) -> None:
    from sfumato.pipelines.recipe import file_hash

    path = recipe["request"].get("image")
    if path is None:
        return
    file = Path(path).expanduser()
    if not file.is_file() or file_hash(file) != recipe["image"]["sha256"]:
        raise UsageError(f"the picture this one started from, {path}, is gone or changed; put it back to replay")
