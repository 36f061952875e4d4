"""Waiting for a job within a request, and handling clients that disconnect."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sfumato.jobs.store import Event
from sfumato.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from fastapi import Request

    from sfumato.jobs.queue import JobQueue
    from sfumato.jobs.store import Job

__all__ = ["GRACE", "Waiting", "failed"]

# Seconds that a job continues after its last client has disconnected. A client that timed out retries sooner than this.
GRACE = 15.0
STATUS = {"request": 400, "model": 400}


class Waiting:
    """Counts the clients that wait for each job, and cancels a job that nobody waits for any more."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue, self._waiting = queue, Counter[str]()
        self._ends: set[asyncio.Task[None]] = set()

    async def ended(self, id: str, http: Request) -> Job:
        """Wait for a job to end, and return it. Raises `ApiError` if it failed or the client disconnected."""
        following = asyncio.ensure_future(self._last(id))
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait((following, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (following, gone):
                task.cancel()
        job = await asyncio.to_thread(self._queue.store.job, id)
        assert job is not None
        if job.state != "done":
            raise failed(job)
        return job

    async def _last(self, id: str) -> None:
        async for _ in self.follow(id):
            pass

    async def follow(self, id: str) -> AsyncIterator[Event]:
        """Yield a job's events up to its end, or the server's. A job that has ended yields only its end."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def heard(event: Event) -> None:
            if event.type == "stopping" or id in (event.data.get("job"), event.data.get("id")):
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._watched(id), self._queue.hub.listening(heard):
            job = await asyncio.to_thread(self._queue.store.job, id)
            if job is not None and job.ended:
                yield Event("job", self._queue.public(job))
                return
            while True:
                event = await events.get()
                yield event
                if event.type == "stopping" or event.data.get("state") in ("done", "failed", "cancelled"):
                    return

    @contextmanager
    def _watched(self, id: str) -> Iterator[None]:
        self._waiting[id] += 1
        try:
            yield
        finally:
            self._waiting[id] -= 1
            if not self._waiting[id]:
                del self._waiting[id]
                with suppress(RuntimeError):  # the server is stopping; the job continues after a restart
                    task = asyncio.get_running_loop().create_task(self._leave(id))
                    self._ends.add(task)
                    task.add_done_callback(self._ends.discard)

    async def _leave(self, id: str) -> None:
        await asyncio.sleep(GRACE)
        if id not in self._waiting:
            await asyncio.to_thread(self._queue.cancel, id)


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def failed(job: Job) -> ApiError:
    """Return the error for clients that waited for a job that did not succeed."""
    if not job.ended:
        return ApiError(503, "the server is stopping; the job continues at its next start", code="stopping", after=10)
    if job.error is None:
        return ApiError(409, "the job was cancelled", code="cancelled")
    return ApiError(STATUS.get(job.error["kind"], 500), job.error["message"], code=job.error["kind"])
