"""The ASGI application: serves the page at once, and the API once it has been imported."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from sfumato.errors import UsageError
from sfumato.server.security import Guard, content_policy, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sfumato.jobs.queue import JobQueue

__all__ = ["STATIC", "create_app"]

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
