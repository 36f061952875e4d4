"""Server-sent events: live for all clients, and resumable after a reconnection."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from sfumato.jobs.store import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sfumato.jobs.queue import JobQueue

__all__ = ["HEARTBEAT", "events", "line"]

# Seconds of silence before a heartbeat is sent; events that may be buffered for a slow client.
HEARTBEAT, MOST_WAITING = 15.0, 1000


def line(event: Event) -> bytes:
    """Encode an event for the stream."""
    id = "" if event.seq is None else f"id: {event.seq}\n"
    return f"{id}event: {event.type}\ndata: {json.dumps(event.data, ensure_ascii=False)}\n\n".encode()


async def events(queue: JobQueue, since: int | None) -> AsyncIterator[bytes]:
    """Yield encoded events: first those after the number `since`, then new ones as they happen.

    The stream of a client that is too slow ends; the client can reconnect and resume.
    """
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
            if event.type == "stopping":
                return
            if event.seq is None or event.seq > told:  # already sent with the missed ones
                yield line(event)
