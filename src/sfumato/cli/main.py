"""`sfumato`: the list of commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sfumato.cli import (
    bench,
    bulk,
    catalog,
    completion,
    convert,
    coreml,
    doctor,
    download,
    generate,
    models,
    plan,
    replay,
    show,
    studio,
)
from sfumato.cli.streams import discard, prepare_streams
from sfumato.cli.terminal import notes, say
from sfumato.errors import SfumatoError

__all__ = ["app", "main"]


class _Interrupted(SfumatoError):
    """Ctrl-C or a termination signal. The exit code follows shell convention."""

    def __init__(self, when: str, cause: KeyboardInterrupt) -> None:
        super().__init__(f"interrupted{when}")
        self.exit_code = 128 + getattr(cause, "number", signal.SIGINT)


_CLEAN = "; no unfinished files were left behind"


class _Ended(KeyboardInterrupt):
    """Ctrl-C or a termination signal, handled alike so that cleanup is the same."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Commands(TyperGroup):
    """Report what happened on Ctrl-C; typer would exit silently."""

    def invoke(self, ctx: Any) -> Any:
        try:
            os.getcwd()
        except OSError as error:
            raise SfumatoError("the current folder has been deleted; change to another one") from error
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(_CLEAN, error) from error


app = typer.Typer(
    name="sfumato",
    cls=_Commands,
    help="Stable Diffusion that fits the machine it runs on.",
    epilog='Start with: sfumato generate "a red apple, 3d"',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("replay", epilog=replay.EXAMPLES)(replay.replay)
app.command("schedulers", epilog=catalog.EXAMPLES)(catalog.schedulers)
app.command("show", epilog=show.EXAMPLES)(show.show)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("download", epilog=download.EXAMPLES)(download.download)
app.add_typer(models.app, name="models")
app.command("completion", epilog=completion.EXAMPLES)(completion.completion)
app.add_typer(coreml.app, name="coreml")
app.add_typer(bulk.app, name="bulk")
app.command("studio", epilog=studio.STUDIO)(studio.studio)
app.command("serve", epilog=studio.SERVE)(studio.serve)


def _version(wanted: bool) -> None:
    if wanted:
        from sfumato import __version__

        typer.echo(f"sfumato {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Never shows a traceback.

    Exits with 0 on success, 1 on failure, 2 on misuse, and 130, 129 or 143 if ended by Ctrl-C, SIGHUP or SIGTERM.
    Set SFUMATO_TRACEBACK=1 to see where an unexpected error came from.
    """
    prepare_streams()
    received = _end_as_interrupted()
    if completion.COMPLETE in os.environ:
        from typer.completion import completion_init  # pyright: ignore[reportPrivateImportUsage]

        completion_init()
    try:
        with notes(), studio.early_worker(sys.argv[1:]) as child:
            app(obj=child)
    except KeyboardInterrupt as error:
        _fail(_Interrupted(" before anything started", error))
    except BrokenPipeError:
        discard(sys.stdout)  # nobody is reading, so write nothing more
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:
        if received:
            # Compiled code interrupted between its calls to Python may raise a different error instead.
            error = error if isinstance(error, _Interrupted) else _Interrupted(_CLEAN, received[-1])
        elif not isinstance(error, SfumatoError):
            if os.environ.get("SFUMATO_TRACEBACK"):
                raise
            error = SfumatoError(_unexpected(error))
        _fail(error)


def _end_as_interrupted() -> list[_Ended]:
    """Handle termination signals like Ctrl-C. Returns a list that every signal is added to as it arrives."""
    received: list[_Ended] = []
    last = -1.0

    def end(number: int, _: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        # `timeout` sends it twice, which would interrupt the cleanup. A second Ctrl-C is intentional.
        if number == signal.SIGINT or before < 0 or last - before > 1:
            received.append(_Ended(number))
            raise received[-1]

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
    return received


def _unexpected(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "not enough memory; generate fewer (--count) or smaller (--width, --height) images"
    return f"unexpected {type(error).__name__}: {text[:300]} (SFUMATO_TRACEBACK=1 shows where)"


def _fail(error: SfumatoError) -> None:
    say(f"sfumato: {error}")
    sys.exit(error.exit_code)
