"""`sfumato coreml verify`: compares converted models with the checkpoint they came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import options
from sfumato.errors import UsageError
from sfumato.files import expanded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.cli.terminal import Terminal
    from sfumato.coreml.source import Source
    from sfumato.coreml.verification import Verification

__all__ = ["EXAMPLES", "exit_code", "report", "table", "verify"]

EXAMPLES = """\b
Examples:
  sfumato coreml verify coreml-built-in/split_einsum/packages
  sfumato coreml verify ./packages --against stable-diffusion-v1-5/stable-diffusion-v1-5 --json"""


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that contains packages or compiled models.")],
    against: Annotated[
        str | None, typer.Option(help="The checkpoint to compare with. Default: the one the models were made from.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]", help="Adapter that was baked in, with --against. Repeatable."
        ),
    ] = None,
    variant: options.Variant = None,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Also generate an image with both and compare them.")
    ] = True,
    steps: Annotated[
        int | None, typer.Option(help="Steps for that image. Default: the checkpoint's own number, or 4.")
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify converted models.

    Checks weights, graph, precision and an image, on any system. Exits with 0 if everything is accurate enough, with
    1 if something is wrong, and with 3 if something cannot be compared with the checkpoint. Rounding on the Neural
    Engine and on GPUs can only be checked on an Apple device.
    """
    from sfumato.cli.drawing import adapter_file
    from sfumato.cli.early import check_folder, check_model
    from sfumato.cli.terminal import Terminal, print_json

    check_folder(folder)
    if against is not None:
        check_model(against)
    from sfumato.coreml.source import open_source

    terminal = Terminal(quiet=quiet)
    if lora and against is None:
        raise UsageError("--lora goes with --against: name the checkpoint that the adapter was baked into")
    adapters = tuple(adapter_file(one, partial=False) for one in lora or ())
    source = None if against is None else open_source(against, variant=variant, adapters=adapters)
    proof = report(terminal, folder, source, picture=picture, steps=steps)
    if as_json:
        print_json(proof.to_dict())
    else:
        table(proof)
    if code := exit_code([proof]):
        raise typer.Exit(code)


def exit_code(proofs: Sequence[Verification]) -> int:
    """Return 0 if everything is verified, 1 if something is wrong, 3 if something could not be verified."""
    if all(proof.passed for proof in proofs):
        return 0
    return 1 if any(proof.wrong for proof in proofs) else 3


def report(
    terminal: Terminal,
    folder: Path,
    source: Source | None,
    parts: tuple[str, ...] | None = None,
    *,
    picture: bool,
    steps: int | None = None,
) -> Verification:
    """Verify a folder, with a progress display."""
    from sfumato.coreml import verification

    with terminal.stages("verifying") as stage:
        return verification.verify(expanded(folder), source, parts=parts, picture=picture, steps=steps, on_part=stage)


def table(proof: Verification) -> None:
    """Print the comparisons as a table."""
    from rich.markup import escape
    from rich.table import Table

    from sfumato.cli.terminal import output

    console = output()
    console.print(escape(f"{proof.folder} against {proof.source}"), highlight=False, soft_wrap=True)
    rows = Table("part", "comparison", "agreement", "required", "", box=None, pad_edge=False)
    for check in proof.checks:
        needed = "" if check.needed is None else _db(check.needed)
        verdict = "" if check.verdict == "reported" else check.verdict
        rows.add_row(check.part, check.what, _db(check.db), needed, verdict)
    console.print(rows)
    for check in proof.checks:
        if check.hint:
            console.print(escape(f"{check.part}, {check.what}: {check.hint}"), highlight=False, soft_wrap=True)


def _db(value: float) -> str:
    if value == -math.inf:
        return "not finite"
    return "equal" if value == math.inf else f"{value:.1f} dB"
