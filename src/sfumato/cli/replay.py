"""`sfumato replay`: a picture again, from the recipe it carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines import DiffusionPipeline

__all__ = ["EXAMPLES", "replay"]

EXAMPLES = """\b
Examples:
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
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.files import check_writable
    from sfumato.images import auto_grid, next_free, open_image, psnr, read_recipe, save_png
    from sfumato.pipelines.components import scheduler_from_recipe
    from sfumato.request import GenerateRequest

    recipe, original = read_recipe(picture), open_image(picture)
    _check_recipe(recipe, picture)
    request = GenerateRequest.from_dict(recipe["request"])
    path = output or picture.with_name(f"{picture.stem}-replay.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"pictures are written as PNG, so --output must end in .png, not {path.name}")
    check_writable(path.parent)
    terminal = Terminal(quiet=quiet)
    pipeline = _load(terminal, recipe, picture, model, device, dtype)
    pipeline.scheduler = scheduler_from_recipe(recipe["scheduler"]["class"], recipe["scheduler"]["config"])
    with terminal.steps("drawing") as bar:
        result = pipeline.generate(request.replace(scheduler=None), bar.show)
    image = auto_grid(result.images) if recipe.get("grid") else result.images[0]
    likeness = psnr(original, image)
    written = save_png(
        image, path if overwrite else next_free(path), recipe | result.recipes[0] | {"request": recipe["request"]}
    )
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


def _check_recipe(recipe: dict[str, Any], picture: Path) -> None:
    """Raise `UsageError` unless the recipe is whole and the picture it starts from is still the same."""
    from sfumato.pipelines.recipe import file_hash

    start = recipe["request"].get("image")
    wanted = {"model": ("name", "weights"), "scheduler": ("class", "config"), "image": ("sha256",) if start else ()}
    if "coreml" in recipe:
        wanted["coreml"] = ("engine", "kind", "compute_unit")
    for key, parts in wanted.items():
        value = recipe.get(key, {})
        if not isinstance(value, dict) or any(part not in value for part in parts) or "dtype" not in recipe:
            raise UsageError(f"the recipe of {picture} is not whole; replay a PNG as Sfumato wrote it")
    if start:
        file = Path(start).expanduser()
        if not file.is_file() or file_hash(file) != recipe["image"]["sha256"]:
            raise UsageError(f"the picture this one started from, {start}, is gone or changed; put it back to replay")


def _load(
    terminal: Terminal, recipe: dict[str, Any], picture: Path, model: str | None, device: str | None, dtype: str | None
) -> DiffusionPipeline:
    """The checkpoint the picture was drawn with. Raises `UsageError` if it is another one."""
    from sfumato.cli.coreml_generate import replay_models
    from sfumato.cli.generate import load_model
    from sfumato.pipelines.recipe import weights_hash

    name, converted = model or str(recipe["model"]["name"]), recipe.get("coreml")
    if converted is not None and (device, dtype) != (None, None):
        raise UsageError(f"{picture} was drawn with converted models, which take no --device and no --dtype")
    try:
        if converted is not None:
            pipeline = replay_models(terminal, name, converted)
        else:
            pipeline = load_model(terminal, name, device=device, dtype=dtype or str(recipe["dtype"]))
    except CheckpointError as error:
        if model is not None or Path(name).expanduser().is_dir():
            raise
        raise CheckpointError(
            f"{picture} was drawn with {name}, which cannot be found from here; say where it is now with --model"
        ) from error
    if weights_hash(pipeline) != recipe["model"]["weights"]:
        raise UsageError(f"the weights of {name} are not those {picture} was drawn with; name the right ones (--model)")
    return pipeline
