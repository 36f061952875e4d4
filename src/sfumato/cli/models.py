"""`sfumato models`: lists the checkpoints in the hub cache and their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from sfumato.cli import models_remove, options

if TYPE_CHECKING:
    from sfumato.checkpoints.cached import Cached

__all__ = ["EXAMPLES", "app", "models"]

EXAMPLES = """\b
Examples:
  sfumato models
  sfumato models --json
  sfumato models remove sd15

To set the model that commands use by default, set SFUMATO_MODEL, or put model = "sd15"
in the config file whose path 'sfumato models' prints."""

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, epilog=EXAMPLES)


@app.callback()
def models(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List models and their short names, or remove downloads.

    Lists the models on this machine, and the short names of others.
    """
    if context.invoked_subcommand is not None:
        return
    from sfumato.checkpoints.builtin import relatives
    from sfumato.checkpoints.cached import cached_models
    from sfumato.checkpoints.names import PUBLISHED
    from sfumato.cli.settings import config_file, default_model
    from sfumato.cli.terminal import print_json

    found, (default, source) = cached_models(), default_model()
    others = {name: repo for name, repo in PUBLISHED.items() if repo not in {one.repo for one in found}}
    if as_json:
        cached = [{"name": one.name, "id": one.repo, "bytes": one.bytes, "kind": one.kind} for one in found]
        print_json({"cached": cached, "default": default, "not_downloaded": others, "relatives": [*relatives()]})
        return
    _show(found, others)
    where = source if source != str(config_file()) else f"set in {source}"
    typer.echo(f"\nDefault model: {default} ({where}; config file: {config_file()})")


def _show(found: list[Cached], others: dict[str, str]) -> None:
    from rich.table import Table

    from sfumato.checkpoints.builtin import BUILT_IN, builtin_model, relatives
    from sfumato.cli.terminal import output
    from sfumato.runtime.reasons import gigabytes

    console = output()
    size = sum(path.stat().st_size for path in builtin_model().rglob("*") if path.is_file())
    table = Table("name", "hub id", "kind", "size", box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    table.add_row(BUILT_IN, "(part of the package)", "checkpoint", gigabytes(size))
    for one in found:
        table.add_row(one.name or "", one.repo, one.kind, gigabytes(one.bytes))
    console.print(table)
    console.print(f"made for {BUILT_IN}: {', '.join(relatives())}", highlight=False)
    total = sum(one.bytes for one in found)
    console.print(f"{len(found)} downloaded, {gigabytes(total)} in total", highlight=False)
    table = Table("name", "hub id", box=None, pad_edge=False)
    for name, repo in others.items():
        table.add_row(name, repo)
    console.print("\nNot downloaded ('sfumato download NAME'):", highlight=False)
    console.print(table)


app.command("remove", epilog=models_remove.EXAMPLES)(models_remove.remove)
