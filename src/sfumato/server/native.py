"""The native API, used by the studio's page and recommended for new clients.

All bodies are JSON. Errors are `{"error": {"message", "type", "param", "code"}}` with status 400 (invalid request,
type "invalid_request_error"), 401, 403, 404, 413, 415, 429 (with Retry-After) or 503. Times are seconds since 1970.

    GET    /api/health              {"status": "ok", "version": "0.3.0", "worker": WORKER, "queued": 0, "mask": true}
    GET    /api/models?look=true    {"default": "built-in", "models": [MODEL…]}; look: scan the folders again
    GET    /api/samplers            {"samplers": [{"name": "euler", "about": "first order, …"}…], "spacings": […],
                                    "preprocessors": […]}
    POST   /api/plan                {"model"?, "request"} -> PLAN; 503 while the worker starts
    POST   /api/jobs                {"model"?, "request", "client"?, "id"?, "preview"?, "compute_unit"?} ->
                                    202 JOB: it is accepted and stored on disk
    GET    /api/jobs?state=queued&state=running&limit=100&client=…    {"jobs": [JOB…]}, newest first
    GET    /api/jobs/{id}           JOB
    DELETE /api/jobs/{id}           JOB; cancels it unless it has ended
    GET    /api/events              server-sent events, see below
    GET    /api/images?q=…&model=…&cursor=…&limit=50    {"images": [IMAGE…], "cursor": "…" or null, "total": 123}
    GET    /api/images/{key}        IMAGE and {"request": REQUEST or null, "notes": […], "fields": {…}}; any program's
    GET    /api/images/{key}/file   the file itself (?download=1 as an attachment)
    GET    /api/images/{key}/thumb  a WebP of at most 320 pixels per side
    DELETE /api/images/{key}        {"key"}: moved to the trash
    POST   /api/images/{key}/restore    IMAGE: restored from the trash
    POST   /api/recipe              the bytes of a PNG, JPEG or WebP (Content-Type: image/png) ->
                                    {"program", "width", "height", "request", "notes", "fields"}

REQUEST is a `GenerateRequest` as JSON; its documentation describes the fields. Missing fields have their default or the
model's: {"prompt": "a red apple", "negative_prompt": "…", "steps": 20, "guidance_scale": 7.5, "seed": 7, "count": 4,
"width": 512, "height": 512, "scheduler": "euler", "spacing": "karras", "image": IMG, "strength": 0.8,
"mask": {"file": IMG, "edge": 8}, "adapters": [{"file": "NAME of a lora", "weight": 0.8}], "embeddings": [{"file":
"NAME"}], "vae": "NAME of a vae", "controls": [{"model": "NAME of a controlnet", "image": IMG, "preprocessor":
"canny"}], "image_prompts": [{"model": "NAME of an ip-adapter", "encoder": "NAME of an image-encoder", "image":
IMG}]}. IMG is a data URL ("data:image/png;base64,…") or the key of an image on this server. Recipes have the same form
and can be sent back.

JOB: {"id": "9f…", "state": "queued" | "running" | "done" | "failed" | "cancelled", "model": "built-in", "request":
REQUEST with its seed, "client": "…", "created": 1764140000.1, "started": null, "finished": null, "attempts": 0,
"position": 0 (jobs ahead of it; null unless queued), "images": [key…] (in order), "error": {"kind": "request" |
"model" | "memory" | "drawing" | "crash" | "internal", "message": "one sentence"} or null, "notes": ["…"]}.
A job with a known `id` is not created twice: choose one (8 to 64 of a-z, 0-9, "-") to retry safely.

IMAGE: {"key": "32 hex digits", "name": "a-red-apple-0123456789ab.png", "folder": "", "bytes": 1, "width": 128,
"height": 128, "created": 1.0, "prompt": "…", "negative_prompt": "…", "model": "…", "seed": "7", "scheduler": "…",
"program": "Sfumato"}; texts are "" if the file does not contain them.

MODEL: {"name", "kind": "checkpoint" | "core-ml" | "lora" | "embedding" | "controlnet" | "ip-adapter" | "image-encoder"
| "vae", "family", "width", "height", "bytes", "suggested": {"steps": 20, "guidance_scale": 3.0}, "words": ["…"] (what a
small model knows), "compute_units": ["CPU_AND_GPU", …] (of Core ML models, if there is a choice)}.

PLAN: {"fits": true, "seconds": 2.1, "peak_bytes": 1, "free_bytes": 1, "device": "cpu", "dtype": "float32", "width",
"height", "steps", "guidance_scale", "reasons": ["…"], "tokens": {"prompt": 5, "negative_prompt": 0, "limit": 75} or
null while the model is not in memory}, or {"fits": false, "message": "one sentence"}.

WORKER: {"state": "starting" | "ready" | "restarting" | "broken", "device": "…", "kind": "cpu" | "cuda" | "mps"}.

Events, `GET /api/events` (text/event-stream). Those with an id are stored: a client that reconnects with Last-Event-ID
(or ?last=) misses none of them. "reset" means that some are no longer stored or the server is new: reload the lists.

    event: hello      {"last": 17}; the first event of a stream that does not resume
    event: job        id; JOB, whenever its state changes
    event: image      id; IMAGE, a new one in the folder, from any source
    event: removed    id; {"key"}
    event: reset      id or none; {}
    event: progress   {"job", "stage": "loading" | "drawing", "place": 0 (which image of the job), "step": 3, "total":
                      20, "at": 1764140000.1, "seconds_left": 4.2, "preview": "data:image/jpeg;base64,…"}; only job
                      and stage are always present
    event: worker     WORKER

The page is `static/index.html`, served at `/` with the other files of its folder.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field, WithJsonSchema

from sfumato.jobs.gallery import SUFFIXES
from sfumato.jobs.queue import JobQueue
from sfumato.server.errors import ApiError, not_found
from sfumato.server.intake import Intake
from sfumato.server.schema import REQUEST
from sfumato.server.stream import events

__all__ = [
    "Asked", "NewJob", "cancel", "delete", "file", "health", "image", "images", "intake_of", "job", "jobs",
    "models", "plan", "queue_of", "recipe", "restore", "router", "samplers", "stream", "submit", "thumb",
]  # fmt: skip

router = APIRouter(prefix="/api", tags=["native"])

Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Asked(BaseModel):
    """A request and the name of a model. Default: the default model."""

    request: Annotated[dict[str, Any], WithJsonSchema(REQUEST)]
    model: str | None = Field(default=None, max_length=200)


class NewJob(Asked):
    """A job to create.

    id: chosen by the client; preview: whether progress events contain previews; compute_unit: for Core ML models.
    """

    client: str = Field(default="", max_length=100)
    id: str | None = Field(default=None, pattern="^[a-z0-9-]{8,64}$")
    preview: bool = True
    compute_unit: Literal["CPU_AND_GPU", "CPU_AND_NE", "ALL", "CPU_ONLY"] | None = None


def queue_of(request: Request) -> JobQueue:
    """Return the queue that this server serves."""
    return request.app.state.queue


def intake_of(request: Request) -> Intake:
    """Return the object that creates requests from client input."""
    return request.app.state.intake


@router.get("/health")
def health(http: Request) -> dict[str, Any]:
    """Return the state of the server and its worker."""
    from sfumato import __version__

    queue = queue_of(http)
    waiting = queue.store.count("queued", "running")
    return {"status": "ok", "version": __version__, "worker": queue.worker, "queued": waiting, "mask": True}


@router.get("/models")
def models(http: Request, look: bool = False) -> dict[str, Any]:
    """List checkpoints, Core ML models and adapters."""
    found = queue_of(http).models
    return {"default": found.default, "models": [one.public() for one in found.all(look=look)]}


@router.get("/samplers")
def samplers() -> dict[str, Any]:
    """List schedulers, noise schedules and preprocessors for control images."""
    from sfumato.request import PREPROCESSORS, SPACINGS
    from sfumato.schedulers.names import NAMES

    named = [{"name": name, "about": alias.about} for name, alias in NAMES.items()]
    return {"samplers": named, "spacings": SPACINGS, "preprocessors": PREPROCESSORS}


@router.post("/plan")
def plan(http: Request, asked: Asked) -> dict[str, Any]:
    """Estimate the time and memory of a request on this machine."""
    queue, model = queue_of(http), asked.model or queue_of(http).models.default
    told = queue.plan(intake_of(http).request(asked.request), model)
    if told is None:
        raise ApiError(503, "the worker is still starting; try again in a few seconds", after=2)
    if "plan" in told:
        return {"fits": True, **told["plan"]}
    if told["kind"] == "memory":
        return {"fits": False, "message": told["message"]}
    raise ApiError(400, told["message"])


@router.post("/jobs", status_code=202)
def submit(http: Request, new: NewJob) -> dict[str, Any]:
    """Create a job. It is stored on disk before the response is sent."""
    queue = queue_of(http)
    model = queue.models.get(new.model or queue.models.default, "checkpoint", "core-ml").name
    request = intake_of(http).request(new.request)
    options = {"preview": new.preview} | ({"compute_unit": new.compute_unit} if new.compute_unit else {})
    return queue.public(queue.submit(request, model, client=new.client, id=new.id, **options))


@router.get("/jobs")
def jobs(
    http: Request,
    state: Annotated[list[str] | None, Query()] = None,
    limit: Limit = 100,
    client: Annotated[str | None, Query(max_length=100)] = None,
) -> dict[str, Any]:
    """List jobs, newest first."""
    queue = queue_of(http)
    found = queue.store.jobs(*(state or ()), most=limit, client=client)
    return {"jobs": [queue.public(one) for one in found]}


@router.get("/jobs/{id}")
def job(http: Request, id: str) -> dict[str, Any]:
    """Return one job."""
    if (found := queue_of(http).store.job(id)) is None:
        raise not_found("job", id)
    return queue_of(http).public(found)


@router.delete("/jobs/{id}")
def cancel(http: Request, id: str) -> dict[str, Any]:
    """Cancel a job unless it has ended."""
    if (found := queue_of(http).cancel(id)) is None:
        raise not_found("job", id)
    return queue_of(http).public(found)


@router.get("/events")
def stream(http: Request, last: Annotated[int | None, Query(ge=0)] = None) -> StreamingResponse:
    """Stream events as they happen."""
    told = http.headers.get("last-event-id", "")
    since = int(told) if told.isdecimal() and len(told) < 16 else last
    return StreamingResponse(
        events(queue_of(http), since), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@router.get("/images")
def images(
    http: Request,
    q: Annotated[str, Query(max_length=1000)] = "",
    model: Annotated[str, Query(max_length=200)] = "",
    cursor: Annotated[str, Query(max_length=100)] = "",
    limit: Limit = 50,
) -> dict[str, Any]:
    """List the images in the folder, newest first."""
    found, following, total = queue_of(http).gallery.find(q, model=model, cursor=cursor, most=limit)
    return {"images": found, "cursor": following, "total": total}


@router.get("/images/{key}")
def image(http: Request, key: Key) -> dict[str, Any]:
    """Return one image and its settings."""
    gallery = queue_of(http).gallery
    row, path = gallery.get(key), gallery.path_of(key)
    if row is None or path is None:
        raise not_found("image", key)
    return row | intake_of(http).remembered(path)


@router.get("/images/{key}/file")
def file(http: Request, key: Key, download: bool = False) -> FileResponse:
    """Return an image's file."""
    return _file(queue_of(http).gallery.path_of(key), key, "attachment" if download else "inline")


@router.get("/images/{key}/thumb")
def thumb(http: Request, key: Key) -> FileResponse:
    """Return an image's thumbnail."""
    return _file(queue_of(http).gallery.thumbnail(key), key, "inline")


def _file(path: Any, key: str, how: str) -> FileResponse:
    if path is None:
        raise not_found("image", key)
    kind = SUFFIXES[path.suffix.lower()]
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": f'"{key}"'}
    return FileResponse(path, media_type=kind, filename=path.name, content_disposition_type=how, headers=headers)


@router.delete("/images/{key}")
def delete(http: Request, key: Key) -> dict[str, Any]:
    """Move an image to the trash."""
    if not queue_of(http).gallery.delete(key):
        raise not_found("image", key)
    return {"key": key}


@router.post("/images/{key}/restore")
def restore(http: Request, key: Key) -> dict[str, Any]:
    """Restore an image from the trash."""
    if (row := queue_of(http).gallery.restore(key)) is None:
        raise not_found("image", key)
    return row


@router.post("/recipe")
async def recipe(http: Request) -> dict[str, Any]:
    """Read the settings stored in an image, from Sfumato or another program."""
    from fastapi.concurrency import run_in_threadpool

    return await run_in_threadpool(intake_of(http).recipe, await http.body())
