"""Combines the three APIs into one application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from sfumato import __version__
from sfumato.server import native, openai, sdapi
from sfumato.server.errors import add_handlers
from sfumato.server.intake import Intake
from sfumato.server.waiting import Waiting

if TYPE_CHECKING:
    from sfumato.jobs.queue import JobQueue

__all__ = ["create_api"]


def create_api(queue: JobQueue) -> FastAPI:
    """Create the application that serves the native API, OpenAI's and A1111's."""
    app = FastAPI(
        title="Sfumato", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        summary="Stable Diffusion that fits the machine it runs on.",
    )  # fmt: skip
    app.state.queue, app.state.intake, app.state.waiting = queue, Intake(queue), Waiting(queue)
    add_handlers(app)
    for router in (native.router, openai.router, sdapi.router):
        app.include_router(router)
    return app
