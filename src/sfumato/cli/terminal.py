"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from sfumato.pipelines.result import Step

__all__ = ["StepBar", "Terminal", "output", "print_json"]


def print_json(value: Any) -> None:
    """A value on standard output, for programs."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not unicode, default=str))


def output() -> Console:
    """Where tables for a person go. Into a pipe or a file no line is folded or cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=1000)


class Terminal:
    """Progress and notes for a person: silent with `quiet`, and no moving lines where nobody watches them."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.hidden = quiet or not sys.stderr.isatty()
        if self.hidden:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the hub's library is imported
        logging.getLogger("sfumato").addHandler(_Echo(quiet))

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something without steps goes on."""
        if self.hidden:
            yield
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(what)):
            yield

    @contextmanager
    def stages(self, what: str) -> Iterator[Callable[[str], None]]:
        """A spinner that names the stage it is told last."""
        if self.hidden:
            yield lambda stage: None
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(what)) as status:
            yield lambda stage: status.update(escape(f"{what}: {stage}"))

    @contextmanager
    def steps(self, what: str) -> Iterator[StepBar]:
        """A bar with the time left; it disappears when the block ends."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=self.hidden, transient=True) as progress:
            yield StepBar(progress, progress.add_task(what, total=None))


class StepBar:
    """Follows the steps of one request."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def show(self, step: Step) -> None:
        """Show how far this step brought us."""
        self._progress.update(self._task, completed=step.number, total=step.total)


class _Echo(logging.Handler):
    """Warnings of the library, each once, as lines on standard error."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(logging.ERROR if quiet else logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            typer.echo(f"note: {text}", err=True)
