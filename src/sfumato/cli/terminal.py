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

# The longest sentence that is printed whole.
MOST_CHARACTERS = 600

log = logging.getLogger("sfumato")


def plain(text: str) -> str:
    """A text as one line that does nothing to a terminal, whatever file its words come from.

    What cannot be printed becomes "�", and of a long text the middle is omitted.
    """
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS * 2 // 3]} … {text[-MOST_CHARACTERS // 3 :]}"
    return _printable(text)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    return char if char.isprintable() else " " if char.isspace() else "\ufffd"


def say(text: str) -> None:
    """One line for a person, on standard error."""
    print(plain(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """A value on standard output, for programs."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16")
    text = json.dumps(value, indent=2, ensure_ascii=not unicode, default=str)
    if not text.isprintable():  # every other character than these means the same to a program when it is escaped
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    typer.echo(text)


def output() -> Console:
    """Where tables for a person go. Into a pipe or a file no line is folded or cut."""
    return _console() if sys.stdout.isatty() else _console(width=1000)


def _console(**options: Any) -> Console:
    from rich.console import Console

    class Printable(Console):
        """A console on which the words of files do nothing but stand there."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(_printable(text), **options)

    return Printable(emoji=False, **options)


@contextmanager
def notes() -> Iterator[None]:
    """Within the block the library's log becomes lines on standard error, each once."""
    echo, level = _Echo(), log.level
    log.addHandler(echo)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(echo)
        log.setLevel(level)


class Terminal:
    """Progress and notes for a person: silent with `quiet`, and no moving lines where nobody watches them."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.hidden = quiet or not sys.stderr.isatty()
        if self.hidden:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the hub's library is imported
        if quiet:
            log.setLevel(logging.ERROR)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something without steps goes on."""
        if self.hidden:
            yield
            return
        from rich.markup import escape

        with _console(stderr=True).status(escape(plain(what))):
            yield

    @contextmanager
    def stages(self, what: str) -> Iterator[Callable[[str], None]]:
        """A spinner that names the stage it is told last."""
        if self.hidden:
            yield lambda stage: None
            return
        from rich.markup import escape

        with _console(stderr=True).status(escape(plain(what))) as status:
            yield lambda stage: status.update(escape(plain(f"{what}: {stage}")))

    @contextmanager
    def steps(self, what: str) -> Iterator[StepBar]:
        """A bar with the time left; it disappears when the block ends."""
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
    """Follows the steps of one request."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def show(self, step: Step) -> None:
        """Show how far this step brought us."""
        self._progress.update(self._task, completed=step.number, total=step.total)


class _Echo(logging.Handler):
    """What the library logs, each sentence once, as lines on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            say(f"note: {text}")
