"""Server-sent events: live for everyone who listens, with resume for those who reconnect."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from sfumato.jobs.store import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sfumato.jobs.queue import JobQueue

__all__ = ["HEARTBEAT", "events", "line"]

# Seconds after which a quiet stream shows that it is there; events that may wait for a slow client.
HEARTBEAT, MOST_WAITING = 15.0, 1000


def line(event: Event) -> bytes:
    """An event as the stream has it."""
    id = "" if event.seq is None else f"id: {event.seq}\n"
    return f"{id}event: {event.type}\ndata: {json.dumps(event.data, ensure_ascii=False)}\n\n".encode()


async def events(queue: JobQueue, since: int | None) -> AsyncIterator[bytes]:
    """The events from now on; those after the number `since` first. A client that is too slow is let go, to resume."""
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Event](MOST_WAITING)
    lost = False

    def put(event: Event) -> None:
        nonlocal lost
        try:
            waiting.put_nowait(event)
        except asyncio.QueueFull:
            lost = True

    def heard(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, event)

    with queue.hub.listening(heard):
        told = 0
        if since is None:
            told = await asyncio.to_thread(lambda: queue.store.last_event)
            yield line(Event("hello", {"last": told}, told))
        else:
            missed = await asyncio.to_thread(queue.store.events_after, since)
            if missed is None:
                told = await asyncio.to_thread(lambda: queue.store.last_event)
                yield line(Event("reset", {}, told))
            for event in missed or ():
                told = event.seq or told
                yield line(event)
        yield line(Event("worker", queue.worker))
        for progress in list(queue.progress.values()):
            yield line(Event("progress", progress))
        while not lost:
            try:
                event = await asyncio.wait_for(waiting.get(), HEARTBEAT)
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if event.seq is None or event.seq > told:  # what happened while the missed ones were fetched is among them
                yield line(event)
