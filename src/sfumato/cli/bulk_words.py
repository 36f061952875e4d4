"""The text that `sfumato bulk` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from sfumato.cli.plan import duration
from sfumato.cli.terminal import say

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.bulk.job import Job
    from sfumato.bulk.run import Outcome

__all__ = ["show_check", "show_outcome", "show_plan", "show_status"]


def show_plan(job: Job, told: dict[str, Any]) -> None:
    """Print the estimate for a job."""
    same = f"{job.bad:,} skipped, " if job.bad else ""
    typer.echo(f"{job.rows:,} rows ({same}{job.pictures:,} different images), job {job.id[:12]}")
    typer.echo(f"one image: {duration(told['seconds_each'])}, {_size(told['bytes_each'])}")
    several = "1 worker" if told["workers"] == 1 else f"{told['workers']} workers"
    cost = f", cost {told['cost']:,.2f}" if told["cost"] else ""
    typer.echo(
        f"all: about {duration(told['seconds'])} with {several} ({told['worker_hours']:,.1f} worker hours{cost}), "
        f"{_size(told['bytes'])} of disk space"
    )


def show_outcome(outcome: Outcome, folder: Path) -> None:
    """Print the outcome of a run."""
    typer.echo(f"{outcome.before + outcome.done:,} of {outcome.pictures:,} images are in {folder}")
    if outcome.done:
        rate = outcome.done / max(outcome.seconds, 1e-9)
        say(f"{outcome.done:,} generated in this run, {rate:.2f} per second")
    if outcome.set_aside:
        say(f"{len(outcome.set_aside):,} failed 3 times; 'sfumato bulk status {folder}' shows why")
    if outcome.left:
        say(f"{outcome.left:,} left; run the same command again to continue")


def show_status(told: dict[str, Any], price: float) -> None:
    """Print the progress of a job."""
    state = "running" if told["running"] else "not running"
    typer.echo(f"{told['done']:,} of {told['images']:,} images, {state}")
    if told["images_per_second"]:
        left = f", {duration(told['seconds_left'])} left" if told["left"] else ""
        typer.echo(f"{told['images_per_second']:.2f} per second{left}")
    each = told["seconds_each"]
    if each["p50"] is not None:
        typer.echo(
            f"per image: {duration(each['p50'])} (p50), {duration(each['p95'])} (p95); {_size(told['bytes'])} in total"
        )
    if price:
        typer.echo(f"{told['worker_hours']:,.2f} worker hours, cost {told['cost']:,.2f}")
    for kind, number in told["errors"].items():
        typer.echo(f"errors: {number:,} × {kind}")
    if told["set_aside"]:
        typer.echo(f"{told['set_aside']:,} failed 3 times; retry them with 'sfumato bulk run … --retry'")
    for key in told["alarms"]:
        typer.echo(f"ALARM: two different images were generated for {key}; find out which machine is wrong")


def show_check(found: dict[str, Any]) -> None:
    """Print what is wrong with a job's images."""
    typer.echo(f"{found['checked']:,} of {found['images']:,} images checked")
    words = {"missing": "missing", "changed": "changed", "not_drawn": "not generated yet"}
    words |= {"orphans": "not in the ledger", "alarms": "generated twice with different results"}
    for name, word in words.items():
        if found[name]:
            some = ", ".join(found[name][:5]) + (" …" if len(found[name]) > 5 else "")
            typer.echo(f"{len(found[name]):,} {word}: {some}")
    for key, likeness in found["decibels"].items():
        typer.echo(f"{key} again: " + ("identical" if likeness == float("inf") else f"{likeness:.1f} dB"))


def _size(count: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
