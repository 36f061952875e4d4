"""`sfumato`: the commands, and the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sfumato.cli import bench, catalog, coreml, doctor, download, generate, plan, replay, show
from sfumato.errors import SfumatoError

__all__ = ["app", "main"]


class _Interrupted(SfumatoError):
    """Ctrl-C; the shells' own exit code for it."""

    exit_code = 130


class _Commands(TyperGroup):
    """Typer turns Ctrl-C into an exit without a word; this says what became of the work."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted("interrupted; nothing half-written is left behind") from error


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
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("download", epilog=download.EXAMPLES)(download.download)
app.add_typer(coreml.app, name="coreml")


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
    """Run the command line: exit code 0, 2 for misuse, 1 for failure, 130 when interrupted; never a traceback.

    Set SFUMATO_TRACEBACK=1 to see where an unexpected error came from.
    """
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted before anything was begun", _Interrupted.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: say no more
        sys.exit(1)
    except SfumatoError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if os.environ.get("SFUMATO_TRACEBACK"):
            raise
        _fail(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "there is not enough memory for this; ask for fewer (--count) or smaller (--width, --height) pictures"
    return f"unexpected {type(error).__name__}: {text[:300]} (SFUMATO_TRACEBACK=1 shows where)"


def _fail(sentence: str, code: int) -> None:
    typer.echo(f"sfumato: {sentence}", err=True)
    sys.exit(code)
