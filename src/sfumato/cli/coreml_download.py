"""`sfumato coreml download`: downloads converted models from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EXAMPLES", "download"]

EXAMPLES = """\b
Examples:
  sfumato coreml download apple/coreml-stable-diffusion-v1-4
  sfumato coreml download apple/coreml-stable-diffusion-v1-4 --variant split_einsum/compiled -o models"""


def download(
    repo: Annotated[str, typer.Argument(metavar="ID", help="A hub id such as owner/name.")],
    variant: Annotated[
        str | None,
        typer.Option(
            help="The folder of the repository to download. Default: original/packages, if it exists.", metavar="FOLDER"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where to put it. Default: the hub cache."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Download one variant of converted models and print its folder.

    Existing files are not downloaded again.
    """
    from sfumato.cli.terminal import Terminal

    Terminal(quiet=False)  # before importing huggingface_hub, whose progress bars it may hide
    from sfumato.coreml.download import download as fetch

    typer.echo(fetch(repo, variant, output=output, revision=revision))
