"""The queue: accepts jobs, runs them one at a time in the worker, and ends each exactly once."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from sfumato.errors import SfumatoError, UsageError
from sfumato.files import output_folder
from sfumato.jobs.events import Hub
from sfumato.jobs.gallery import HIDDEN, Gallery
from sfumato.jobs.process import Process
from sfumato.jobs.store import Event, Job, Store
from sfumato.locks import locked

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.jobs.models import Models
    from sfumato.jobs.process import Child
    from sfumato.request import GenerateRequest

__all__ = ["Full", "JobQueue"]

log = logging.getLogger("sfumato")

# A job fails after this many attempts, or after this many restarts of the server while it was running.
ATTEMPTS, RESTARTS = 3, 50
MOST_JOBS, MOST_OF_CLIENT = 200, 100
# Seconds until a worker that does not react to a cancellation is killed; between quick and between full folder scans.
PATIENCE, LOOK, LOOK_AT_ALL = 2.0, 1.0, 60.0


class Full(SfumatoError):
    """The queue is full. after: seconds until the client should retry."""

    def __init__(self, sentence: str, after: int) -> None:
        super().__init__(sentence)
        self.after = after


class JobQueue:
    """The jobs, images and events of a folder. `start` begins running jobs. All methods are thread-safe."""

    def __init__(self, folder: Path, models: Models, *, device: str | None = None, dtype: str | None = None) -> None:
        """Raises `OutputError` if the folder cannot be written."""
        self.folder, self.models, self.hub = folder, models, Hub()
        self._lock = ExitStack()
        self._lock.enter_context(
            locked(
                output_folder(folder / HIDDEN) / "lock",
                busy=f"another studio is using {folder}; use that one, or choose another folder with --output",
                unknown=f"{folder} is on a file system without locks; do not start a second studio there",
            )
        )
        self.store = Store(output_folder(folder / HIDDEN) / "studio.db")
        self.gallery = Gallery(folder, self.store, self._tell)
        self._options = {"device": device, "dtype": dtype}
        self._child: Child | None = None
        self._changed, self._telling = threading.Condition(), threading.Lock()
        self._process: Process | None = None
        self._running: str | None = None
        self._told_cancel: float | None = None
        self._stopping = False
        self._deaths = 0
        self._plans: dict[str, dict[str, Any] | None] = {}
        self.worker: dict[str, Any] = {"state": "starting"}
        self.progress: dict[str, dict[str, Any]] = {}
        self._threads: list[threading.Thread] = []

    # Requests.

    def submit(
        self, request: GenerateRequest, model: str, *, client: str = "", id: str | None = None, **options: Any
    ) -> Job:
        """Create a job, or return the existing one with this id. The job is stored on disk when this returns.

        id: chosen by the client, so that it can safely retry. Raises `Full` and `UsageError`.
        """
        if id is not None and (known := self.store.job(id)) is not None:
            if known.client == client:
                return known
            raise UsageError(f"another client has a job {id}; choose another id")
        if self.store.count("queued", "running") >= MOST_JOBS:
            raise Full(f"{MOST_JOBS} jobs are waiting; try again when some are done", self._wait())
        if self.store.count("queued", "running", client=client) >= MOST_OF_CLIENT:
            raise Full(f"{MOST_OF_CLIENT} jobs of this client are waiting; try again when some are done", self._wait())
        if request.seed is None:
            request = request.replace(seed=secrets.randbits(32))
        id = id or secrets.token_hex(8)
        job = Job(0, id, "queued", model, request.to_dict(), client, options, time.time())
        if not self.store.add(job):
            return self._job(id)
        if self.worker["state"] == "broken":  # it may have been fixed since
            self._deaths = 0
        self._wake()
        return self._tell_job(id)

    def cancel(self, id: str) -> Job | None:
        """Cancel a job unless it has ended, and return it. Returns None if there is no such job."""
        if self.store.change(id, ("queued",), state="cancelled", finished=time.time()):
            return self._tell_job(id)
        with self._changed:
            if self._running == id and self._told_cancel is None and self._process is not None:
                self._told_cancel = time.monotonic()
                self._process.tell(do="cancel", job=id)
                self._changed.notify_all()
        return self.store.job(id)

    def plan(self, request: GenerateRequest, model: str, patience: float = 30.0) -> dict[str, Any] | None:
        """Return the worker's estimate for a request; None if it does not answer within `patience` seconds."""
        id = secrets.token_hex(8)
        end = time.monotonic() + patience
        with self._changed:
            while self.worker["state"] == "starting" and not self._stopping and time.monotonic() < end:
                self._changed.wait(0.5)
            if self._process is None:
                return None
            self._plans[id] = None
            self._process.tell(do="plan", id=id, model=self.models.path(model), request=request.to_dict())
            while self._plans[id] is None and not self._stopping and time.monotonic() < end:
                self._changed.wait(0.5)
            return self._plans.pop(id)

    def position(self, job: Job) -> int | None:
        """Return the number of jobs ahead of a waiting job; None if it is not waiting."""
        if job.state != "queued":
            return None
        sql = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND number < ?"
        return self.store.rows(sql, (job.number,))[0][0]

    def _wait(self) -> int:
        done = self.store.jobs("done", most=20)
        took = [job.finished - job.started for job in done if job.finished and job.started]
        return max(1, min(600, int(sum(took) / len(took)) if took else 10))

    # Start and stop.

    def start(self, child: Child | None = None) -> None:
        """Resume the jobs of the last run, and start the worker. child: one that has already been started."""
        self._child = child
        for job in self.store.jobs("running", most=10**6):
            if job.restarts >= RESTARTS:
                self._end(job.id, "failed", error={"kind": "crash", "message": "the server was restarted too often"})
            else:
                self.store.change(job.id, ("running",), state="queued", restarts=job.restarts + 1, attempts=0)
        self._sweep()
        self._tell("reset", {})
        for target in (self._draw, self._look):
            self._threads.append(threading.Thread(target=target, name=f"sfumato{target.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stop the worker. A running job runs again at the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self._process is not None:
            self._process.end()
        self.store.close()
        self._lock.close()

    def _sweep(self) -> None:
        """Remove incomplete files left by killed workers."""
        for path in self.folder.glob(".*.part"):
            if re.fullmatch(r"\..+-[0-9a-f]{12}\.png\.\d+\.[0-9a-f]{8}\.part", path.name):
                with suppress(OSError):
                    path.unlink()
        self.gallery.empty_trash()

    def _look(self) -> None:
        last = 0.0
        while not self._stopping:
            whole = time.monotonic() - last > LOOK_AT_ALL
            last = time.monotonic() if whole else last
            try:
                if not whole:  # after a second, so that neither the page nor the first image waits for it
                    import sfumato.metadata.carriers  # noqa: F401
                self.gallery.scan(whole=whole, stop=lambda: self._stopping)
            except Exception as error:
                log.warning("cannot scan the folder (%s); trying again", error)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, LOOK)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # Running jobs: only this thread starts and ends workers and jobs.

    def _draw(self) -> None:
        while not self._stopping:
            with self._changed:
                if self._process is None:
                    self._begin()
                if self._running is None and self.worker["state"] not in ("starting", "broken"):
                    self._next()
                self._end_what_does_not_hear()
                self._changed.wait(0.2 if self._told_cancel else 1.0)

    def _begin(self) -> None:
        if self._deaths >= ATTEMPTS:
            return
        self._tell_worker("starting")
        child, self._child = self._child, None
        self._process = Process(self.folder, self._heard, self._options, child)

    def _next(self) -> None:
        waiting = self.store.jobs("queued", most=1, newest=False)
        if not waiting or self._process is None:
            return
        job, now = waiting[0], time.time()
        attempts = job.attempts + 1
        self.store.change(job.id, ("queued",), state="running", started=job.started or now, attempts=attempts)
        lean = job.options.get("lean", False) or attempts == ATTEMPTS
        self._running, self._told_cancel = job.id, None
        try:
            model = self.models.get(job.model, "checkpoint", "core-ml")
        except UsageError as error:  # the model existed when the job was accepted
            self._end(job.id, "failed", error={"kind": "model", "message": str(error)})
            return
        self._process.tell(
            do="draw", job=job.id, name=model.name, model=model.path, kind=model.kind, request=job.request,
            options={**job.options, "lean": lean}, done=sorted(job.images),
        )  # fmt: skip
        self._tell_job(job.id)

    def _end_what_does_not_hear(self) -> None:
        if self._told_cancel is not None and time.monotonic() - self._told_cancel > PATIENCE and self._process:
            process, self._told_cancel = self._process, None
            self._running, id = None, self._running
            self._process = None
            process.kill()
            if id is not None:
                self._end(id, "cancelled")
            self._tell_worker("restarting")

    def _heard(self, process: Process, message: dict[str, Any]) -> None:
        with self._changed:
            if process is self._process:
                getattr(self, f"_on_{message.pop('is')}")(**message)
                self._changed.notify_all()

    def _on_ready(self, **told: Any) -> None:
        self._tell_worker("ready", **told)
        self._deaths = 0
        if self._process is not None:
            model = self.models.get(self.models.default)
            self._process.tell(do="warm", name=model.name, model=model.path, kind=model.kind)

    def _on_loading(self, job: str | None, model: str) -> None:
        if job is not None:
            self._pass("progress", job, stage="loading", model=model)

    def _on_began(self, job: str, total: int, tokens: dict[str, int] | None) -> None:
        counted = 0 if tokens is None else tokens["prompt"] + tokens["negative_prompt"]
        self.store.change(job, ("running",), options={**self._job(job).options, "tokens": counted})
        self._pass("progress", job, stage="drawing", images=total)

    def _on_step(self, job: str, **told: Any) -> None:
        self._pass("progress", job, stage="drawing", **told)

    def _on_partial(self, job: str, **told: Any) -> None:
        self.hub.send(Event("partial", {"job": job, **told}))

    def _on_image(self, job: str, place: int, path: str) -> None:
        row = self.gallery.add(self.folder / path)
        if row is not None:
            self.store.drawn(job, place, row["key"])
            self.hub.send(Event("drawn", {"job": job, "place": place, "key": row["key"]}))

    def _on_done(self, job: str, notes: list[str]) -> None:
        self._end(job, "done", notes=[*self._job(job).notes, *notes])

    def _on_cancelled(self, job: str) -> None:
        self._end(job, "cancelled")

    def _on_failed(self, job: str, kind: str, message: str) -> None:
        found = self._job(job)
        if kind == "memory" and not found.options.get("lean"):
            note = f"{message}; tried again in a way that needs less memory"
            self._again(found, options=found.options | {"lean": True}, notes=[*found.notes, note])
        else:
            self._end(job, "failed", error={"kind": kind, "message": message})

    def _on_plan(self, id: str, **told: Any) -> None:
        if id in self._plans:
            self._plans[id] = told

    def _on_gone(self, code: int) -> None:
        """The worker died: its job loses only this attempt."""
        self._process = None
        if self.worker["state"] == "starting":
            self._deaths += 1
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._running is not None:
            job = self._job(self._running)
            if self._told_cancel is not None:
                self._end(job.id, "cancelled")
            elif job.attempts >= ATTEMPTS:
                sentence = f"the worker died {ATTEMPTS} times while generating it ({why}); try a smaller image"
                self._end(job.id, "failed", error={"kind": "crash", "message": sentence})
            else:
                self._again(job, notes=[*job.notes, f"the worker died ({why}), so the job was started again"])
        if self._deaths >= ATTEMPTS:
            self._break(why)
        elif not self._stopping:
            self._tell_worker("restarting")

    def _break(self, why: str) -> None:
        sentence = f"the worker does not start ({why}); see its output in the terminal, then restart Sfumato"
        self._tell_worker("broken", message=sentence)
        for job in self.store.jobs("queued", most=10**6):
            self._end(job.id, "failed", error={"kind": "crash", "message": sentence})

    def _again(self, job: Job, **changes: Any) -> None:
        self.store.change(job.id, ("running",), state="queued", **changes)
        self._forget_running(job.id)
        self._tell_job(job.id)

    def _end(self, id: str, state: str, **changes: Any) -> None:
        if self.store.change(id, ("queued", "running"), state=state, finished=time.time(), **changes):
            self._forget_running(id)
            self._tell_job(id)

    def _forget_running(self, id: str) -> None:
        self.progress.pop(id, None)
        if self._running == id:
            self._running, self._told_cancel = None, None

    # Events.

    def _job(self, id: str) -> Job:
        job = self.store.job(id)
        assert job is not None
        return job

    def _tell(self, type: str, data: dict[str, Any]) -> None:
        with self._telling:  # listeners receive events in order
            self.hub.send(self.store.tell(type, data))

    def _tell_job(self, id: str) -> Job:
        job = self._job(id)
        self._tell("job", self.public(job))
        return job

    def _tell_worker(self, state: str, **more: Any) -> None:
        self.worker = {"state": state, **more}
        self.hub.send(Event("worker", self.worker))

    def _pass(self, type: str, job: str, **told: Any) -> None:
        self.progress[job] = {"job": job, **told}
        self.hub.send(Event(type, self.progress[job]))

    def public(self, job: Job) -> dict[str, Any]:
        """Return the fields of a job that clients may see."""
        return {
            "id": job.id, "state": job.state, "model": job.model, "request": job.request, "client": job.client,
            "created": job.created, "started": job.started, "finished": job.finished, "attempts": job.attempts,
            "position": self.position(job), "images": list(job.images.values()), "error": job.error,
            "notes": list(job.notes),
        }  # fmt: skip
