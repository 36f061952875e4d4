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
# What the paths of the APIs begin with.
APIS = ("/api/", "/v1/", "/sdapi/")


def create_app(queue: JobQueue, *, page: bool = True, host: str = "127.0.0.1", token: str | None = None) -> ASGIApp:
    """The server of a queue, which is the caller's to start and stop; with the studio's page, or without.

    host: the address that is listened at; token: what clients must know, which off the loopback address is not left
    to choice. Raises `UsageError`.
    """
    if token is None and not is_loopback(host):
        raise UsageError(f"whoever can reach {host} could use this server; set a token, or listen at 127.0.0.1")
    policy = content_policy(STATIC / "index.html")
    return Guard(_Door(queue, page and STATIC.is_dir()), host=host, token=token, policy=policy)


class _Door:
    """The page's files; and whatever is none of these is the API's, which is imported meanwhile."""

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
