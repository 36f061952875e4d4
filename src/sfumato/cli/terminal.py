"""Terminal output: results on standard output, everything else on standard error."""

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

__all__ = ["MOST_CHARACTERS", "StepBar", "Terminal", "notes", "output", "plain", "print_json", "say"]

# The maximum length of a printed sentence; longer ones are shortened.
MOST_CHARACTERS = 600

log = logging.getLogger("sfumato")


def plain(text: str) -> str:
    """Make text safe to print as a single line, whatever file it comes from.

    Characters that cannot be printed become "�", and the middle of a long text is omitted.
    """
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS * 2 // 3]} … {text[-MOST_CHARACTERS // 3 :]}"
    return _printable(text)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    return char if char.isprintable() else " " if char.isspace() else "\ufffd"


def say(text: str) -> None:
    """Print a line for people on standard error."""
    print(plain(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16")
    text = json.dumps(value, indent=2, ensure_ascii=not unicode, default=str)
    if not text.isprintable():  # escape what a terminal might interpret; to a JSON parser it means the same
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    typer.echo(text)


def output() -> Console:
    """Return the console for tables. Lines are not wrapped or truncated in pipes and files."""
    return _console() if sys.stdout.isatty() else _console(width=1000)


def _console(**options: Any) -> Console:
    from rich.console import Console

    class Printable(Console):
        """A console that strips control characters from text that comes from files."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(_printable(text), **options)

    return Printable(emoji=False, **options)


@contextmanager
def notes() -> Iterator[None]:
    """Print the library's log as notes on standard error inside this context, each message once."""
    echo, level = _Echo(), log.level
    log.addHandler(echo)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(echo)
        log.setLevel(level)


class Terminal:
    """Progress and notes for people. Shows nothing if `quiet`, and no animations unless stderr is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.hidden = quiet or not sys.stderr.isatty()
        if self.hidden:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
        if quiet:
            log.setLevel(logging.ERROR)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show a spinner during work without steps."""
        if self.hidden:
            yield
            return
        from rich.markup import escape

        with _console(stderr=True).status(escape(plain(what))):
            yield

    @contextmanager
    def stages(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner with the name of the current stage."""
        if self.hidden:
            yield lambda stage: None
            return
        from rich.markup import escape

        with _console(stderr=True).status(escape(plain(what))) as status:
            yield lambda stage: status.update(escape(plain(f"{what}: {stage}")))

    @contextmanager
    def steps(self, what: str) -> Iterator[StepBar]:
        """Show a progress bar with the time left, which disappears at the end."""
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
        with Progress(*columns, console=_console(stderr=True), disable=self.hidden, transient=True) as progress:
            yield StepBar(progress, progress.add_task(what, total=None))


class StepBar:
    """The progress bar of one request."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def show(self, step: Step) -> None:
        """Update the bar to this step."""
        self._progress.update(self._task, completed=step.number, total=step.total)


class _Echo(logging.Handler):
    """Prints log messages on standard error, each once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            say(f"note: {text}")
