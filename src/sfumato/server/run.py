"""Starts the server: first the socket, then the queue and its worker, whose imports take longest, then the page."""

from __future__ import annotations

import socket
from threading import Thread
from typing import TYPE_CHECKING

from sfumato.errors import UsageError
from sfumato.files import output_folder
from sfumato.jobs.models import Models
from sfumato.jobs.queue import JobQueue
from sfumato.server.security import is_loopback, new_token

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.jobs.process import Child

__all__ = ["listening", "run"]


def listening(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises `UsageError` if the address cannot be used."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.socket(kind, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)  # clients that connect now wait until the application is ready
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
    return found


def run(
    folder: Path,
    *,
    host: str,
    port: int,
    models: Path | None,
    default: str,
    token: str | None,
    device: str | None,
    dtype: str | None,
    page: bool,
    browser: bool,
    child: Child | None = None,
) -> None:
    """Serve until interrupted. child: a worker that has already been started."""
    given, token = token is not None, token or (None if is_loopback(host) else new_token())
    sock = listening(host, port)
    queue = JobQueue(output_folder(folder).absolute(), Models(models, default), device=device, dtype=dtype)
    queue.start(child)  # its worker takes seconds to import torch, in parallel with everything below
    try:
        from sfumato.server.app import create_app, serve

        app = create_app(queue, page=page, host=host, token=token)
        place = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        link = place if token is None or not page else f"{place}/?token={token}"
        print(f"Sfumato is running at {link} (press Ctrl-C to stop)", flush=True)
        if not page and token is not None and not given:
            print(f"Clients must send this token: {token}", flush=True)
        if browser:
            import webbrowser

            here = link.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
            Thread(target=webbrowser.open, args=(here,), daemon=True).start()
        serve(app, queue, sock)
    finally:
        queue.stop()
