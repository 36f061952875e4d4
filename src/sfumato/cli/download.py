"""`sfumato download`: downloads a checkpoint from the hub to the local cache."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.checkpoints.names import EXAMPLE
from sfumato.cli.options import Variant, complete_models

__all__ = ["EXAMPLES", "download"]

EXAMPLES = """\b
Examples:
  sfumato download sd15
  sfumato download stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16
  sfumato download apple/coreml-stable-diffusion-v1-4 --include "original/packages/*\""""


def download(
    repo: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help=f"A hub id such as owner/name, a short name such as {EXAMPLE}, or the URL of a single file.",
            autocompletion=complete_models,
        ),
    ],
    variant: Variant = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Download only matching files. Can be given more than once."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Download a checkpoint from the hub and print where it is.

    Files that are already in the cache are not downloaded again.
    """
    from sfumato.checkpoints.locate import HubOptions, by_patterns, find_folder, full_name, locate_folder
    from sfumato.checkpoints.locate import download as fetch
    from sfumato.checkpoints.locate_file import is_single_file, locate_file
    from sfumato.cli.terminal import Terminal

    Terminal(quiet=False)
    repo = full_name(repo)
    if is_single_file(repo):
        folder = locate_file(repo, **({} if revision is None else {"revision": revision}))
    elif include:
        folder = fetch(repo, by_patterns(*include), HubOptions(revision=revision))
    else:
        find_folder(repo)  # reject an invalid name before torch is imported
        from sfumato.pipelines.components import ComponentFiles

        select = ComponentFiles(variant).select
        folder = locate_folder(repo, select, revision=revision)
        # A local folder may contain anything.
        select([path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")]], False)
    typer.echo(folder)
