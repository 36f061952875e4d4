"""`sfumato studio` and `sfumato serve`: the server, with and without the page."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sfumato.jobs.process import Child

__all__ = ["SERVE", "STUDIO", "early_worker", "serve", "studio"]

STUDIO = """\b
Examples:
  sfumato studio
  sfumato studio --models ~/models --output ~/Pictures/sfumato
  sfumato studio --host 0.0.0.0"""
SERVE = """\b
Examples:
  sfumato serve
  sfumato serve --port 8000 --output ./images --token my-secret"""

Host = Annotated[str, typer.Option(help="Address to listen on. Any other than this machine's own requires a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")]
ModelFolder = Annotated[
    Path | None, typer.Option("--models", help="A folder of checkpoints, LoRAs and embeddings to offer.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for images. Default: sfumato in your Pictures folder.")
]
Token = Annotated[
    str | None,
    typer.Option(envvar="SFUMATO_TOKEN", help="Token that clients must send. Default: none, for local use only."),
]


@contextmanager
def early_worker(words: Sequence[str]) -> Iterator[Child | None]:
    """Start the worker of a command line that needs one, before its options are read: that takes a third of a second.

    It is killed if the command ends without it.
    """
    if words[:1] not in (["studio"], ["serve"]) or not {"-h", "--help"}.isdisjoint(words):
        yield None
        return
    from sfumato.jobs.process import start_worker

    child = start_worker()
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()


def studio(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 7867,
    models: ModelFolder = None,
    output: Output = None,
    token: Token = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Open the studio, a web page for generating images.

    Also serves the same APIs as `sfumato serve`.
    """
    _run(context.obj, host, port, models, output, token, model, device, dtype, page=True, browser=not no_browser)


def serve(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 7867,
    models: ModelFolder = None,
    output: Output = None,
    token: Token = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Generate images over HTTP.

    Serves Sfumato's own API, OpenAI's Images API and AUTOMATIC1111's API.
    """
    _run(context.obj, host, port, models, output, token, model, device, dtype, page=False, browser=False)


def _run(
    child: Child | None,
    host: str,
    port: int,
    models: Path | None,
    output: Path | None,
    token: str | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    *,
    page: bool,
    browser: bool,
) -> None:
    from sfumato.cli.early import check_choices
    from sfumato.cli.settings import chosen_model
    from sfumato.errors import MissingExtra
    from sfumato.files import expanded

    check_choices(device, dtype=dtype)
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "python_multipart")):
        raise MissingExtra("the studio needs FastAPI and uvicorn; install them with: pip install 'sfumato[studio]'")
    if device not in (None, "auto", "cpu"):  # may be absent; the server would learn it from a worker that dies
        from sfumato.runtime.device import parse_device

        parse_device(device)
    from sfumato.server.run import run

    run(
        expanded(output) if output else Path.home() / "Pictures" / "sfumato",
        host=host, port=port, models=None if models is None else expanded(models), default=chosen_model(model),
        token=token, device=device, dtype=dtype, page=page, browser=browser, child=child,
    )  # fmt: skip
