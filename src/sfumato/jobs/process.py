"""The worker process seen from its parent: messages in and out, one JSON object per line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Heard = Callable[["Process", dict[str, Any]], None]

__all__ = ["Child", "Process", "start_worker"]

Child = subprocess.Popen[bytes]

# Maximum length of a message in bytes; the longest ones contain previews and partial images.
MOST_LINE = 2**26


def start_worker() -> Child:
    """Start a worker. It imports torch, which takes seconds, and waits for a `Process` to tell it where to work.

    It ends with this process, or when its input is closed.
    """
    # -P: never import files from the current folder. New session: Ctrl-C in the terminal reaches only the server.
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sfumato.jobs.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=os.name == "posix", env={**os.environ, **quiet},
    )  # fmt: skip


class Process:
    """A worker process that runs in a folder.

    heard: called in a separate thread as `heard(process, message)`, the last time with {"is": "gone"}.
    """

    def __init__(self, folder: Path, heard: Heard, options: dict[str, Any], child: Child | None = None) -> None:
        """options: its "device" and "dtype"; child: a worker that has already been started."""
        self._child = child or start_worker()
        self._lock, self._heard = threading.Lock(), heard
        self._thread = threading.Thread(target=self._listen, name="sfumato-worker", daemon=True)
        self._thread.start()
        self.tell(do="begin", folder=str(folder), **options)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def tell(self, **message: Any) -> None:
        """Send a message, unless the worker has ended."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock, suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.write(line)
            self._child.stdin.flush()

    def kill(self) -> None:
        """Kill the process."""
        self._child.kill()

    def end(self, patience: float = 0.0) -> None:
        """End the process by closing its input. Kill it if it is still running after `patience` seconds."""
        with self._lock, suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        try:
            self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._child.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as stream:
            while line := stream.readline(MOST_LINE):
                try:
                    message = json.loads(line)
                except ValueError:  # an incomplete line from a killed process
                    continue
                self._heard(self, message)
        with self._lock, suppress(OSError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        self._heard(self, {"is": "gone", "code": self._child.wait()})
