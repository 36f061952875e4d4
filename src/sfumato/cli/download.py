"""`sfumato download`: a checkpoint from the hub into the local cache."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["EXAMPLES", "download"]

EXAMPLES = """\b
Examples:
  sfumato download stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16
  sfumato download apple/coreml-stable-diffusion-v1-4 --include "original/packages/*\""""


def download(
    repo: Annotated[str, typer.Argument(metavar="ID", help="A hub id such as owner/name.")],
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only files that match it; may be given several times.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Fetch what drawing needs from the hub, and print the folder. Files that are here are not fetched again."""
    from sfumato.checkpoints.locate import HubOptions, by_patterns, locate_folder
    from sfumato.checkpoints.locate import download as fetch
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines.components import ComponentFiles

    Terminal(quiet=False)
    if include:
        folder = fetch(repo, by_patterns(*include), HubOptions(revision=revision))
    else:
        folder = locate_folder(repo, ComponentFiles(variant).select, revision=revision)
    typer.echo(folder)
