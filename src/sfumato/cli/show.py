"""`sfumato show`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["EXAMPLES", "show"]

EXAMPLES = """\b
Examples:
  sfumato show
  sfumato show ./my-checkpoint
  sfumato show stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16"""


def show(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint folder or a hub id in the local cache; the built-in model if left out."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a checkpoint is: family, parameters, bytes, dtype, scheduler. Loads no weights and uses no network."""
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.cli.terminal import output, print_json
    from sfumato.pipelines.summary import summarize

    facts = summarize(model or BUILT_IN, variant=variant)
    if as_json:
        print_json(facts)
        return
    from rich.markup import escape
    from rich.table import Table

    console = output()
    console.print(
        f"[bold]{escape(facts['name'])}[/bold]: {facts['family']}, pictures of {facts['width']} × {facts['height']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("part", "class", "parameters", "bytes", "dtype", box=None, pad_edge=False)
    for part, entry in facts["parts"].items():
        table.add_row(
            part, entry["class"], _count(entry.get("parameters")), _bytes(entry.get("bytes")), entry.get("dtype", "")
        )
    table.add_row("total", "", _count(facts["parameters"]), _bytes(facts["bytes"]), "")
    console.print(table)
    console.print(f"predicts {facts['prediction_type']}, reads {facts['prompt_tokens']} tokens", highlight=False)
    for line in _abilities(facts):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _abilities(facts: dict[str, Any]) -> list[str]:
    """What a model of few words says of itself."""
    if "words" not in facts:
        return []
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["suggested"].items())
    return [
        f"a small model for demonstration, which can draw nothing but {len(facts['words'])} things",
        f"styles: {', '.join(facts['styles'])}",
        *([f"suggests: {settings}"] if settings else []),
        f"things: {', '.join(facts['words'])}",
    ]


def _count(number: Any) -> str:
    return "" if number is None else f"{number / 1e6:,.1f} M"


def _bytes(number: Any) -> str:
    return "" if number is None else f"{number / 2**20:,.1f} MiB"
