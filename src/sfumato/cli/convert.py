"""`sfumato convert`: converts a checkpoint to another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import options

__all__ = ["EXAMPLES", "convert"]

EXAMPLES = """\b
Examples:
  sfumato convert sd_xl_base_1.0.safetensors ./sdxl
  sfumato convert ./my-checkpoint my-checkpoint.safetensors --dtype float16
  sfumato convert old.ckpt old.safetensors --pickle
  sfumato convert sdxl_lightning_4step_unet.safetensors ./lightning --config ./sdxl"""


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint: folder, file, hub id or short name.", autocompletion=options.complete_models
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="A folder, or a file that ends in .safetensors for the original layout.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: the stored precision.")
    ] = None,
    family: options.Family = None,
    prediction_type: options.PredictionType = None,
    config: options.Config = None,
    original_config: Annotated[
        str | None, typer.Option(help="The file's configuration in YAML, if it is not next to the file.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the U-Net's averaged weights, if there are any.")] = False,
    pickle: Annotated[
        bool, typer.Option("--pickle", help="Read a pickled file (.ckpt, .pt, .bin) from a source you trust.")
    ] = False,
    variant: options.Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or folder.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a checkpoint to a folder or to a single file.

    Prints the path of the result.
    """
    from sfumato.cli.early import check_choices, check_model

    check_choices(None, dtype=dtype)
    check_model(model)
    from sfumato.cli.terminal import Terminal
    from sfumato.files import check_writable, expanded
    from sfumato.pipelines import convert as work
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.source import open_source
    from sfumato.runtime.device import parse_dtype

    terminal, target, precision = Terminal(quiet=quiet), expanded(output), parse_dtype(dtype)
    check_writable(target.parent, target.name)
    said = {"family": family, "prediction_type": prediction_type, "config": config}
    said |= {"original_config": original_config, "ema": ema}
    source = open_source(model, ComponentFiles(variant, False if pickle else None), {}, options=said)
    with terminal.working(f"converting {model}"):
        notes = work.convert(source, target, dtype=precision, overwrite=overwrite)
    for note in () if quiet else notes:
        typer.echo(note, err=True)
    typer.echo(target)
