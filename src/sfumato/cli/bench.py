"""`sfumato bench`: the guide's way to quick pictures, measured on this machine, and other libraries beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.bench.report import Report, Row
    from sfumato.runtime.facts import Facts

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = """\b
Examples:
  sfumato bench
  sfumato bench --model ./my-checkpoint --quick
  sfumato bench --peers diffusers,openvino --json bench.json --plot bench.svg"""


def bench(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder or hub id; the built-in small model if left out.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels along each side; the checkpoint's own if left out.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the first rows; better ones need 0.4 of them.")] = 50,
    runs: Annotated[int, typer.Option(help="Runs of each row; medians are shown.")] = 3,
    peers: Annotated[str, typer.Option(help="Libraries to measure beside it: diffusers, openvino or both.")] = "",
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write everything to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the times into this SVG file.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a few steps of each picture and reckon the others from them.")
    ] = False,
) -> None:
    """Measure pictures on this machine: float32, half precision, a better scheduler, eight at once; time and memory."""
    from sfumato.bench.cases import Machine
    from sfumato.bench.report import Setting, run
    from sfumato.checkpoints.builtin import BUILT_IN
    from sfumato.checkpoints.locate import locate_folder
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.sizes import read_sizes
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import task_of
    from sfumato.runtime.facts import read_facts

    _check_files(as_json, plot)
    facts = read_facts()
    names = tuple(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    model = model or BUILT_IN
    folder = locate_folder(model, ComponentFiles().select)
    sizes = read_sizes(folder)
    side = size or sizes.picture_size[0]
    task_of(sizes, GenerateRequest(width=side, height=side))  # refuses a size that cannot be made
    machine = Machine.of(facts, side)
    setting = Setting(folder=str(folder), machine=machine, steps=steps, runs=runs, peers=names, quick=quick)
    report = run(setting, Terminal(quiet=False).working)
    what = f"{model}, {side} × {side}"
    if as_json is not None:
        _write_json(as_json, report, facts, {"model": model, "size": side, "steps": steps})
    if plot is not None:
        _write_plot(plot, report, f"Seconds per picture: {what}, {facts.name}")
    _show(report, facts, what)


def _check_files(as_json: Path | None, plot: Path | None) -> None:
    """What can be known to be wrong before an hour of measuring."""
    from sfumato.files import check_writable

    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"plots are drawn as SVG, so --plot must end in .svg, not {plot.suffix or plot.name!r}")
    for path in (as_json, plot):
        if path is not None:
            check_writable(path.expanduser().parent)


def _write_json(path: Path, report: Report, facts: Facts, about: dict[str, Any]) -> None:
    import dataclasses

    from sfumato.files import output_folder, write_json

    path = path.expanduser()
    output_folder(path.parent)
    write_json(path, about | dataclasses.asdict(report) | {"machine": facts.to_dict()})


def _write_plot(path: Path, report: Report, title: str) -> None:
    from sfumato.bench.plot import bars
    from sfumato.files import output_folder, replacing

    path = path.expanduser()
    output_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(bars(title, report.pictures), encoding="utf-8")


def _show(report: Report, facts: Facts, what: str) -> None:
    from rich.markup import escape

    from sfumato.cli.terminal import output

    console = output()
    console.print(f"[bold]{escape(what)}[/bold] on [bold]{escape(facts.name)}[/bold]", highlight=False, soft_wrap=True)
    console.print(_table("picture", "seconds per picture", report.pictures))
    for title, rows in (("one call of the U-Net", report.unet), ("one decoding by the VAE", report.vae)):
        if rows:
            console.print()
            console.print(_table(title, "seconds", rows))
    for note in report.notes:
        console.print(f"- {escape(note)}", highlight=False, soft_wrap=True)


def _table(title: str, seconds: str, rows: Sequence[Row]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from sfumato.runtime.reasons import gigabytes

    stepwise = any(row.seconds_per_step is not None for row in rows)
    table = Table(title, box=None, pad_edge=False)
    for column in (seconds, *(["per step"] if stepwise else []), "peak memory", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        a_step = [_number(row.seconds_per_step or 0.0)] if stepwise else []
        table.add_row(escape(row.name), _number(row.seconds), *a_step, gigabytes(row.peak_bytes), f"{row.ratio:.2f}")
    return table


def _number(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"
