"""The ASGI application, which serves the page at once and the API once it has been imported, and its server."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from sfumato.errors import UsageError
from sfumato.jobs.store import Event
from sfumato.server.security import Guard, content_policy, is_loopback

if TYPE_CHECKING:
    from socket import socket

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sfumato.jobs.queue import JobQueue

__all__ = ["STATIC", "create_app", "serve"]

STATIC = Path(__file__).parent / "static"
# Path prefixes of the APIs.
APIS = ("/api/", "/v1/", "/sdapi/")


def create_app(queue: JobQueue, *, page: bool = True, host: str = "127.0.0.1", token: str | None = None) -> ASGIApp:
    """Create the server for a queue, with or without the studio's page. The caller starts and stops the queue.

    host: the address the server listens on. token: the secret that clients must send. Raises `UsageError` if there is
    no token and the address is not the loopback address.
    """
    if token is None and not is_loopback(host):
        raise UsageError(f"anyone who can reach {host} could use this server; set a token, or listen on 127.0.0.1")
    policy = content_policy(STATIC / "index.html")
    return Guard(_Door(queue, page and STATIC.is_dir()), host=host, token=token, policy=policy)


def serve(app: ASGIApp, queue: JobQueue, sock: socket) -> None:
    """Serve an application on a listening socket. Raises `KeyboardInterrupt` when it is stopped."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, lifespan="off"
    )
    _Server(config, queue).run(sockets=[sock])
    raise KeyboardInterrupt  # asyncio swallows Ctrl-C if its main task has already finished


class _Server(uvicorn.Server):
    """Ends streams of events before it stops: an open page would delay it, and be reported as an error."""

    def __init__(self, config: uvicorn.Config, queue: JobQueue) -> None:
        super().__init__(config)
        self._hub = queue.hub

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._hub.send(Event("stopping", {}))
        await super().shutdown(sockets)


class _Door:
    """Serves the page's files, and passes all other paths to the API, which is imported in the background."""

    def __init__(self, queue: JobQueue, page: bool) -> None:
        self._page = StaticFiles(directory=STATIC, html=True) if page else None
        importing = ThreadPoolExecutor(1, "sfumato-import")
        self._api = importing.submit(_api, queue)
        importing.shutdown(wait=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._page is not None and not scope["path"].startswith(APIS):
            try:
                await self._page(scope, receive, send)
                return
            except HTTPException:  # nothing has been sent yet
                pass
        await (await asyncio.wrap_future(self._api))(scope, receive, send)


def _api(queue: JobQueue) -> FastAPI:
    from sfumato.server.api import create_api

    return create_api(queue)
