"""`sfumato models remove`: deletes a downloaded model."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.cli import options

__all__ = ["EXAMPLES", "remove"]

EXAMPLES = """\b
Examples:
  sfumato models remove sd15
  sfumato models remove stable-diffusion-v1-5/stable-diffusion-v1-5"""


def _complete_cached(incomplete: str) -> list[str]:
    from sfumato.checkpoints.cached import cached_models

    names = [name for one in cached_models() for name in (one.name, one.repo) if name]
    return [name for name in names if name.startswith(incomplete)]


def remove(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A short name or hub id that 'sfumato models' lists.", autocompletion=_complete_cached
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Delete a downloaded model from the hub cache."""
    from sfumato.checkpoints.cached import remove_cached
    from sfumato.cli.terminal import print_json
    from sfumato.runtime.reasons import gigabytes

    removed = remove_cached(name)
    if as_json:
        print_json({"removed": removed.repo, "bytes": removed.bytes})
        return
    typer.echo(f"removed {removed.repo}: {gigabytes(removed.bytes)} freed")
