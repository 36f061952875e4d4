"""`sfumato coreml verify`: converted models proved against the checkpoint they were made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sfumato.cli.terminal import Terminal
    from sfumato.coreml.source import Source
    from sfumato.coreml.verification import Verification

__all__ = ["EXAMPLES", "report", "table", "verify"]

EXAMPLES = """\b
Examples:
  sfumato coreml verify coreml-built-in/split_einsum/packages
  sfumato coreml verify ./packages --against stable-diffusion-v1-5/stable-diffusion-v1-5 --json"""


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of packages or compiled models, nested or not.")],
    against: Annotated[
        str | None, typer.Option(help="The checkpoint; the one the models were made from if left out.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of its weight files, such as fp16.")] = None,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Also draw a picture with both and compare them.")
    ] = True,
    steps: Annotated[int | None, typer.Option(help="Steps of that picture; the checkpoint's own number, or 4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Prove converted models on any system: the graph, the precision shipped, the palettes and a picture.

    Exits with 0 if all is as good as needed, else with 1. What Apple's Neural Engine and GPUs round differently, only
    they can show.
    """
    from sfumato.cli.terminal import Terminal, print_json
    from sfumato.coreml.source import open_source

    terminal = Terminal(quiet=quiet)
    source = None if against is None else open_source(against, variant=variant)
    proof = report(terminal, folder, source, picture=picture, steps=steps)
    if as_json:
        print_json(proof.to_dict())
    else:
        table(proof)
    if not proof.passed:
        raise typer.Exit(1)


def report(
    terminal: Terminal,
    folder: Path,
    source: Source | None,
    parts: tuple[str, ...] | None = None,
    *,
    picture: bool,
    steps: int | None = None,
) -> Verification:
    """Verify a folder, showing what is being done."""
    from sfumato.coreml import verification

    with terminal.stages("verifying") as stage:
        return verification.verify(
            folder.expanduser(), source, parts=parts, picture=picture, steps=steps, on_part=stage
        )


def table(proof: Verification) -> None:
    """What was compared, for a person."""
    from rich.markup import escape
    from rich.table import Table

    from sfumato.cli.terminal import output

    console = output()
    console.print(escape(f"{proof.folder} against {proof.source}"), highlight=False, soft_wrap=True)
    rows = Table("part", "compared", "agreement", "needed", "", box=None, pad_edge=False)
    for check in proof.checks:
        needed = "" if check.needed is None else _db(check.needed)
        rows.add_row(check.part, check.what, _db(check.db), needed, "ok" if check.passed else "WRONG")
    console.print(rows)
    for check in proof.checks:
        if check.hint:
            console.print(escape(f"{check.part}, {check.what}: {check.hint}"), highlight=False, soft_wrap=True)


def _db(value: float) -> str:
    if value == -math.inf:
        return "not finite"
    return "equal" if value == math.inf else f"{value:.1f} dB"
