"""Publishing events to listeners."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.jobs.store import Event

__all__ = ["Hub"]


class Hub:
    """Passes each event to all listeners. They are called in the sender's thread and must be quick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[object, Callable[[Event], None]] = {}

    def send(self, event: Event) -> None:
        """Call all listeners with an event."""
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener(event)

    @contextmanager
    def listening(self, listener: Callable[[Event], None]) -> Iterator[None]:
        """Call `listener` with every event that is sent within the block."""
        token = object()
        with self._lock:
            self._listeners[token] = listener
        try:
            yield
        finally:
            with self._lock:
                del self._listeners[token]
