"""The application: all routers over one queue."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from sfumato import __version__
from sfumato.errors import UsageError
from sfumato.server import native, openai, sdapi
from sfumato.server.errors import add_handlers
from sfumato.server.intake import Intake
from sfumato.server.security import Guard, content_policy, is_loopback
from sfumato.server.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sfumato.jobs.queue import JobQueue

__all__ = ["STATIC", "create_app"]

STATIC = Path(__file__).parent / "static"


def create_app(queue: JobQueue, *, page: bool = True, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """The server of a queue, which it starts and stops; with the studio's page, or without.

    host: the address that is listened at; token: what clients must know, which off the loopback address is not left
    to choice. Raises `UsageError`.
    """
    if token is None and not is_loopback(host):
        raise UsageError(f"whoever can reach {host} could use this server; set a token, or listen at 127.0.0.1")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        queue.stop()

    app = FastAPI(
        title="Sfumato", version=__version__, lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False,
        summary="Stable Diffusion that fits the machine it runs on.",
    )  # fmt: skip
    app.state.queue, app.state.intake = queue, Intake(queue)
    add_handlers(app)
    app.state.waiting = Waiting(queue)
    for router in (native.router, openai.router, sdapi.router):
        app.include_router(router)
    app.add_middleware(Guard, host=host, token=token, policy=content_policy(STATIC / "index.html"))
    if page and STATIC.is_dir():
        app.mount("/", StaticFiles(directory=STATIC, html=True), name="page")
    return app
