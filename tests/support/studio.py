"""A real server on loopback, and a small client that speaks to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Actor", "Client", "finishes", "serving", "until"]


def until(look: Any, holds: Any, seconds: float = 60) -> Any:
    """What `look` finds, once `holds` is true of it."""
    end = time.monotonic() + seconds
    while not holds(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


class Client:
    """Sends requests to a port of this machine; answers are (status, JSON or bytes, headers)."""

    def __init__(self, port: int, **headers: str) -> None:
        self.port, self.headers = port, headers

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = dict(self.headers)
        if body is not None and not isinstance(body, bytes):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in answer.getheaders()}
        is_json = told.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(data) if is_json and data else data, told

    def get(self, path: str) -> Any:
        status, body, _ = self("GET", path)
        assert status == 200, (status, body)
        return body

    def submit(self, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        status, body, _ = self("POST", "/api/jobs", {"request": request, **more})
        assert status == 202, (status, body)
        return body

    def ended(self, id: str, seconds: float = 60) -> dict[str, Any]:
        """The job, once it has ended."""
        return self.until(lambda: self.get(f"/api/jobs/{id}"), lambda job: job["state"] in ENDED, seconds)

    until = staticmethod(until)

    @contextmanager
    def events(self, path: str = "/api/events", **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
        """The stream of events, each {"id", "event", "data"}."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", path, headers=sent)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        try:
            yield _parsed(answer)
        finally:
            connection.close()


ENDED = ("done", "failed", "cancelled")


def _parsed(lines: Any) -> Iterator[dict[str, Any]]:
    event: dict[str, Any] = {"id": None}
    for raw in lines:
        line = raw.decode().rstrip("\n")
        name, _, value = line.partition(": ")
        if not line:
            if "event" in event:
                yield event
            event = {"id": None}
        elif name:
            event[name] = json.loads(value) if name == "data" else value


@contextmanager
def serving(
    folder: Path, *, models: Path | None = None, page: bool = False, worker: bool = True, **options: Any
) -> Iterator[Any]:
    """A server in a thread, its worker a real process, or none, so that jobs wait; yields (client, queue)."""
    import uvicorn

    from sfumato.jobs.models import Models
    from sfumato.jobs.queue import JobQueue
    from sfumato.server.app import create_app
    from sfumato.server.run import listening

    sock = listening("127.0.0.1", 0)
    queue = JobQueue(folder, Models(models, cached=False), device="cpu", dtype="float32")
    if not worker:
        queue._begin = lambda: None
    queue.start()
    app = create_app(queue, page=page, **options)
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Client(sock.getsockname()[1]), queue
    finally:
        server.should_exit = True
        thread.join(20)
        queue.stop()
        sock.close()


class Actor:
    """In the place of a worker process: answers each job with the next of `scenes`, which is called with it."""

    pid = 0
    scenes: deque = deque()
    starts: list[Actor] = []
    ready = True

    def __init__(self, folder, heard, *_):
        self.folder, self._heard, self.told, self.dead = folder, heard, [], False
        Actor.starts.append(self)
        if Actor.ready:
            self.say("ready", device="cpu", kind="cpu")
        else:
            self.die(1)

    def say(self, what, **more):
        threading.Thread(target=self._heard, args=(self, {"is": what, **more}), daemon=True).start()

    def tell(self, **message):
        self.told.append(message)
        if message["do"] == "draw" and Actor.scenes:
            Actor.scenes.popleft()(self, message)

    def die(self, code=-9):
        self.dead = True
        self.say("gone", code=code)

    def kill(self):
        self.die()

    def end(self, patience=0.0):
        self.dead = True


def finishes(actor, message):
    actor.say("done", job=message["job"], notes=["drawn"])
