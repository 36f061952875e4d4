"""`sfumato bench`: measures each speed-up from the guide on this machine, also for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import options
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
    model: options.Model = None,
    size: Annotated[int | None, typer.Option(help="Width and height in pixels. Default: the model's own size.")] = None,
    steps: Annotated[
        int, typer.Option(help="Denoising steps of the first rows; rows with better schedulers use 40% of them.")
    ] = 50,
    runs: Annotated[int, typer.Option(help="Runs per row; the median is shown.")] = 3,
    peers: Annotated[
        str, typer.Option(help="Other libraries to measure for comparison: diffusers, openvino or both.")
    ] = "",
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write all results to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot the times to this SVG file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Time a few steps of each image and extrapolate.")] = False,
) -> None:
    """Measure time and memory on this machine.

    Compares float32, half precision, a better scheduler and a batch of eight.
    """
    from sfumato.cli.early import check_model
    from sfumato.cli.settings import chosen_model

    _check_files(as_json, plot)
    model = chosen_model(model)
    check_model(model)
    from sfumato.bench.cases import Machine
    from sfumato.bench.report import Setting, run
    from sfumato.cli.terminal import Terminal
    from sfumato.pipelines.components import ComponentFiles
    from sfumato.pipelines.sizes import read_sizes
    from sfumato.pipelines.source import Folder, open_source
    from sfumato.request import GenerateRequest
    from sfumato.runtime.choices import task_of
    from sfumato.runtime.facts import read_facts

    facts = read_facts()
    names = tuple(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    source = open_source(model, ComponentFiles(), {})
    if names and not isinstance(source, Folder):
        raise UsageError(f"other libraries need a folder; run 'sfumato convert {model} FOLDER' first")
    sizes = read_sizes(source)
    side = size or sizes.picture_size[0]
    task_of(sizes, GenerateRequest(width=side, height=side))  # reject unsupported sizes
    machine = Machine.of(facts, side)
    setting = Setting(folder=str(source.path), machine=machine, steps=steps, runs=runs, peers=names, quick=quick)
    report = run(setting, Terminal(quiet=False).working)
    what = f"{model}, {side} × {side}"
    if as_json is not None:
        _write_json(as_json, report, facts, {"model": model, "size": side, "steps": steps})
    if plot is not None:
        _write_plot(plot, report, f"Seconds per image: {what}, {facts.name}")
    _show(report, facts, what)


def _check_files(as_json: Path | None, plot: Path | None) -> None:
    """Check the output files now rather than after an hour of measuring."""
    from sfumato.files import output_file

    if plot is not None and plot.suffix.lower() != ".svg":
        raise UsageError(f"plots are written as SVG, so --plot must end in .svg, not {plot.suffix or plot.name!r}")
    for path in (as_json, plot):
        if path is not None:
            output_file(path)


def _write_json(path: Path, report: Report, facts: Facts, about: dict[str, Any]) -> None:
    import dataclasses

    from sfumato.files import expanded, output_folder, write_json

    path = expanded(path)
    output_folder(path.parent)
    write_json(path, about | dataclasses.asdict(report) | {"machine": facts.to_dict()})


def _write_plot(path: Path, report: Report, title: str) -> None:
    from sfumato.bench.plot import bars
    from sfumato.files import expanded, output_folder, replacing

    path = expanded(path)
    output_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(bars(title, report.pictures), encoding="utf-8")


def _show(report: Report, facts: Facts, what: str) -> None:
    from rich.markup import escape

    from sfumato.cli.terminal import output

    console = output()
    console.print(f"[bold]{escape(what)}[/bold] on [bold]{escape(facts.name)}[/bold]", highlight=False, soft_wrap=True)
    console.print(_table("image", "seconds per image", report.pictures))
    for title, rows in (("one U-Net call", report.unet), ("one VAE decoding", report.vae)):
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
