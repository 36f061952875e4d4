"""`sfumato bulk`: many images, each generated once, on one machine or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import bulk_words, options
from sfumato.errors import UsageError
from sfumato.files import expanded

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sfumato.bulk.job import Job, Picture
    from sfumato.bulk.painter import Work
    from sfumato.bulk.run import Outcome
    from sfumato.pipelines import DiffusionPipeline

__all__ = ["app", "export", "plan", "run", "status", "verify"]

app = typer.Typer(
    help="Generate many images in a job that survives interruptions.\n\n"
    "Runs on one machine, a Slurm array or a Ray cluster.",
    epilog="Start with: sfumato bulk plan rows.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PLAN = """\b
Examples:
  sfumato bulk plan rows.jsonl
  sfumato bulk plan matrix.toml --workers 8 --price 2.5"""
RUN = """\b
Examples:
  sfumato bulk run rows.jsonl --output images
  sfumato bulk run matrix.toml --output images --model stable-diffusion-v1-5/stable-diffusion-v1-5
  sfumato bulk run rows.parquet --output images --shard 3/16
  sfumato bulk run rows.jsonl --output images --ray auto --workers 2:16 --gpus 1"""
STATUS = """\b
Examples:
  sfumato bulk status images
  sfumato bulk status images --watch --price 2.5
  sfumato bulk status images --json"""
VERIFY = """\b
Examples:
  sfumato bulk verify images
  sfumato bulk verify images --redraw 10
  sfumato bulk verify images --forget"""
EXPORT = """\b
Examples:
  sfumato bulk export images --sheet sheet.png --count 64
  sfumato bulk export images --webdataset shards
  sfumato bulk export images --parquet images.parquet --size 256"""

Rows = Annotated[Path, typer.Argument(help="JSON lines, CSV or Parquet with one request per row, or a TOML matrix.")]
Folder = Annotated[Path, typer.Argument(help="The job's folder.")]
MicroBatch = Annotated[int | None, typer.Option(help="Images per batch. Default: as many as the plan allows.")]
Name = Annotated[
    str | None, typer.Option("--id", help="The job's id, from which seeds are derived. Default: a hash of the rows.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip rows with errors, and list each one.")]
Price = Annotated[float, typer.Option(help="The price of one worker hour.")]


@app.command("plan", epilog=PLAN)
def plan(
    rows: Rows,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    micro_batch: MicroBatch = None,
    name: Name = None,
    skip_bad: SkipBad = False,
    probe: Annotated[int, typer.Option(help="Images to generate for the estimate; they are discarded.")] = 3,
    workers: Annotated[int, typer.Option(help="Number of machines or GPUs like this one.")] = 1,
    price: Price = 0.0,
    as_json: options.AsJson = False,
) -> None:
    """Check every row and estimate time, disk space and cost. Writes nothing."""
    from sfumato.bulk.planning import open_job
    from sfumato.bulk.report import estimate
    from sfumato.cli.terminal import Terminal, print_json

    if probe < 1 or workers < 1:
        raise UsageError("--probe and --workers must be at least 1")
    terminal, sample = Terminal(quiet=False), list[Any]()
    work = _work(Path(), model, device, dtype, variant, micro_batch)
    with terminal.working("checking all rows"):
        pipeline = work.load()
        kept: Callable[[list[Picture]], None] = lambda part: sample.extend(part[:probe])  # noqa: E731
        job = open_job(
            Path(), _readable(rows), pipeline, name=name, skip_bad=skip_bad, on_bad=_say_bad(rows), on_pictures=kept
        )
    chosen = sample[:: max(1, len(sample) // probe)][:probe]
    with terminal.working(f"generating {len(chosen)} images"):
        told = estimate(pipeline, chosen, job.pictures, workers, price)
    counts = {"id": job.id, "rows": job.rows, "bad_rows": job.bad, "images": job.pictures}
    if as_json:
        print_json(counts | told)
    else:
        bulk_words.show_plan(job, told)


@app.command("run", epilog=RUN)
def run(
    rows: Rows,
    output: Annotated[Path, typer.Option("--output", "-o", help="The job's folder. An existing job in it is resumed.")],
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    micro_batch: MicroBatch = None,
    name: Name = None,
    skip_bad: SkipBad = False,
    shard: Annotated[str, typer.Option(help="Generate one of several equal parts: 3/16 is the third of 16.")] = "1/1",
    webdataset: Annotated[
        bool, typer.Option("--webdataset", help="Write WebDataset shards (tar files) instead of single PNGs.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Retry images that failed 3 times.")] = False,
    max_errors: Annotated[int, typer.Option(help="Stop if more images than this fail 3 times.")] = 100,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, auto for this machine's cluster, or local to start one."),
    ] = None,
    workers: Annotated[str, typer.Option(help="Ray: number of actors, or MIN:MAX.")] = "1",
    cpus: Annotated[float, typer.Option(help="Ray: CPUs per actor.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="Ray: GPUs per actor.")] = 0.0,
    max_restarts: Annotated[int, typer.Option(help="Ray: stop after this many actors have died.")] = 100,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate every row once. After an interruption, run the same command again to resume."""
    from sfumato.bulk.extras import arrow
    from sfumato.bulk.job import Shard
    from sfumato.bulk.planning import open_job
    from sfumato.cli.terminal import Terminal, print_json

    arrow()
    part, folder, terminal = Shard.parse(shard), expanded(output), Terminal(quiet=quiet)
    work = _work(folder, model, device, dtype, variant, micro_batch, shards=webdataset)
    with _cluster(ray, workers, cpus) as resources:
        on_gpu = ray is not None and (gpus > 0 or device == "cuda")
        with terminal.working("checking all rows"):
            pipeline = work.load("cpu" if on_gpu else None)
            kind = "cuda" if on_gpu else None
            job = open_job(
                folder, _readable(rows), pipeline, device=kind, name=name, skip_bad=skip_bad, on_bad=_say_bad(rows)
            )
        executor = _pool(work, job, workers, resources, cpus, gpus, max_restarts) if ray else _here(work, pipeline)
        choices = {"retry": retry, "most_errors": max_errors, "webdataset": webdataset}
        outcome = _run(terminal, job, part, executor, _sizes(pipeline, micro_batch), choices)
    if as_json:
        print_json({"folder": str(folder), "left": outcome.left, **outcome.__dict__})
    else:
        bulk_words.show_outcome(outcome, folder)
    if outcome.stopped or outcome.set_aside:
        raise typer.Exit(128 + outcome.stopped if outcome.stopped else 1)


@app.command("status", epilog=STATUS)
def status(
    folder: Folder,
    price: Price = 0.0,
    watch: Annotated[bool, typer.Option("--watch", help="Show a progress bar until the job ends.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the progress of a job: rate, time left, errors by kind. Runs on any machine with access to the folder."""
    import time
    from types import SimpleNamespace

    from sfumato.bulk.report import status as find
    from sfumato.cli.terminal import Terminal, print_json

    place = expanded(folder)
    told = find(place, price)
    with Terminal(quiet=not watch).steps("generating") as bar:
        while watch and told["running"] and told["left"]:
            bar.show(SimpleNamespace(number=told["done"], total=told["images"]))  # pyright: ignore[reportArgumentType]
            time.sleep(5)
            told = find(place, price)
    print_json(told) if as_json else bulk_words.show_status(told, price)


@app.command("verify", epilog=VERIFY)
def verify(
    folder: Folder,
    redraw: Annotated[int, typer.Option(help="Generate this many randomly chosen images again and compare them.")] = 0,
    model: options.Model = None,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="Remove missing and changed images from the ledger, so that the next run generates them."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check that every image exists exactly once and is unchanged."""
    from sfumato.bulk.job import Job, Shard, held
    from sfumato.bulk.ledger import Ledger
    from sfumato.bulk.report import verify as check
    from sfumato.cli.terminal import print_json

    job, pipeline = Job.read(expanded(folder)), None
    if redraw:
        from sfumato.pipelines.recipe import model_digest

        work = _work(job.folder, model, job.numerics["device"], job.numerics["dtype"])
        pipeline = work.load()
        if model_digest(pipeline.parts) != job.model:
            raise UsageError(f"{work.name} is not the checkpoint of this job; give the right one with --model")
    found = check(job, pipeline, redraw)
    if forget and (found["missing"] or found["changed"]):
        with held(job, Shard()):
            for key in found["changed"]:
                job.path_of(key).unlink(missing_ok=True)
            Ledger(job, Shard()).forget([*found["missing"], *found["changed"]])
    print_json(dict(found)) if as_json else bulk_words.show_check(found)
    if not found.is_whole:
        raise typer.Exit(1)


@app.command("export", epilog=EXPORT)
def export(
    folder: Folder,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet to this PNG file.")] = None,
    webdataset: Annotated[Path | None, typer.Option(help="Write WebDataset shards to this folder.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write a Parquet file with a thumbnail of each image.")] = None,
    count: Annotated[int, typer.Option(help="Images on the contact sheet.")] = 64,
    size: Annotated[
        int, typer.Option(help="Size of each image on the contact sheet, and of each thumbnail, in pixels.")
    ] = 128,
    per_shard: Annotated[int, typer.Option(help="Images per WebDataset shard.")] = 5000,
) -> None:
    """Export a job's images for viewing or for training.

    Writes a contact sheet, WebDataset shards or a Parquet file.
    """
    from sfumato.bulk import report
    from sfumato.bulk.job import Job

    if min(count, size, per_shard) < 1 or size > 4096 or count > 10_000:
        raise UsageError("--count must be from 1 to 10,000, --size from 1 to 4096, and --per-shard at least 1")
    if sheet is None and webdataset is None and parquet is None:
        raise UsageError("nothing to export; give --sheet, --webdataset or --parquet")
    job = Job.read(expanded(folder))
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UsageError(f"the contact sheet is a PNG file, so --sheet must end in .png, not {sheet.name}")
        typer.echo(report.contact_sheet(job, expanded(sheet), count, size))
    if webdataset is not None:
        for path in report.webdataset(job, expanded(webdataset), per_shard):
            typer.echo(path)
    if parquet is not None:
        typer.echo(report.thumbnails(job, expanded(parquet), size))


def _readable(rows: Path) -> Path:
    path = expanded(rows)
    if not path.exists():
        raise UsageError(f"there is no file {rows}; check the path")
    return path


def _work(
    folder: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    variant: str | None = None,
    micro_batch: int | None = None,
    *,
    shards: bool = False,
) -> Work:
    from sfumato.bulk.painter import Work
    from sfumato.cli.early import check_choices, check_model
    from sfumato.cli.settings import chosen_model

    name = chosen_model(model)
    check_model(name)
    check_choices(device, dtype=dtype, micro_batch=micro_batch)
    place = expanded(name)
    return Work(
        str(folder.absolute()),
        str(place.absolute()) if place.exists() else name,
        name,
        device,
        dtype,
        variant,
        micro_batch,
        shards=shards,
    )


def _say_bad(rows: Path) -> Callable[[int, Exception], None]:
    from sfumato.cli.terminal import say

    return lambda number, error: say(f"{rows.name}, row {number}: {error}")


def _sizes(pipeline: DiffusionPipeline, micro_batch: int | None) -> Callable[[Picture], int]:
    from sfumato.bulk.painter import BATCH_SECONDS, batch_size, settings_of

    known: dict[str, int] = {}

    def size(picture: Picture) -> int:
        settings = settings_of(picture)
        if settings not in known:
            known[settings] = micro_batch or batch_size(pipeline, picture, BATCH_SECONDS)
        return known[settings]

    return size


def _here(work: Work, pipeline: DiffusionPipeline) -> Any:
    from sfumato.bulk.painter import Painter
    from sfumato.bulk.run import here

    return lambda queue, ledger, ending: here(Painter(work, pipeline), queue, ledger, ending)


def _bounds(workers: str) -> tuple[int, int]:
    least, _, most = workers.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least) <= 10_000):
        raise UsageError(f"--workers must be a number such as 4, or a range such as 2:16, not {workers!r}")
    return int(least), int(most or least)


def _cluster(ray: str | None, workers: str, cpus: float) -> AbstractContextManager[dict[str, float]]:
    from contextlib import nullcontext

    from sfumato.bulk.cluster import connected

    most = _bounds(workers)[1]
    if cpus <= 0:
        raise UsageError(f"--cpus must be above 0, not {cpus:g}")
    if ray is None:
        return nullcontext({})
    return connected(None if ray == "local" else ray, max(1, round(most * cpus)))


def _pool(
    work: Work, job: Job, workers: str, resources: dict[str, float], cpus: float, gpus: float, restarts: int
) -> Any:
    from dataclasses import replace

    from sfumato.bulk.cluster import Pool

    least, most = _bounds(workers)
    work = replace(work, device=job.numerics["device"], dtype=job.numerics["dtype"])
    return Pool(work, least, most, restarts=restarts, cpus=cpus, gpus=gpus)


def _run(terminal: Any, job: Job, part: Any, executor: Any, size: Any, choices: dict[str, Any]) -> Outcome:
    import logging
    from types import SimpleNamespace

    from sfumato.bulk.run import run as draw

    with terminal.steps("generating") as bar:

        def show(outcome: Outcome) -> None:
            done = outcome.before + outcome.done
            bar.show(SimpleNamespace(number=done, total=outcome.pictures))

        log = logging.getLogger("sfumato")
        log.addFilter(_only_of_the_job)  # notes on single images go to the ledger
        try:
            return draw(job, part, executor, size, **choices, on_progress=show)
        finally:
            log.removeFilter(_only_of_the_job)


def _only_of_the_job(record: Any) -> bool:
    return record.module in ("job", "ledger", "cluster")
