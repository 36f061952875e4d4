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
    """Hands each event to everybody who listens. Listeners are called where it happened, and are quick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[object, Callable[[Event], None]] = {}

    def send(self, event: Event) -> None:
        """Tell all who listen."""
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener(event)

    @contextmanager
    def listening(self, listener: Callable[[Event], None]) -> Iterator[None]:
        """Within the block `listener` is told of every event."""
        token = object()
        with self._lock:
            self._listeners[token] = listener
        try:
            yield
        finally:
            with self._lock:
                del self._listeners[token]
