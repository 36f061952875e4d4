"""OpenAI's Images API: generations, edits, streaming and models.

Additional fields, for `extra_body`: negative_prompt, num_inference_steps, guidance_scale, seed, scheduler, strength.
A client that times out repeats its request with x-stainless-retry-count; it then gets the existing job, not a new one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from sfumato.server.errors import ApiError, described
from sfumato.server.images import converted, fitting, painted
from sfumato.server.intake import decoded
from sfumato.server.waiting import failed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sfumato.jobs.models import Model
    from sfumato.jobs.queue import JobQueue
    from sfumato.jobs.store import Event, Job

__all__ = ["Generation", "edits", "generations", "model", "models", "options", "router"]

router = APIRouter(prefix="/v1", tags=["openai"])

# Model names that clients send by default; all stand for the default model.
ALIASES = re.compile(r"dall-e-[23]|gpt-image-[\w.-]+|chatgpt-image-latest")
# Factors for the model's default number of steps.
QUALITIES = {"low": 0.5, "medium": 1.0, "high": 2.0, "hd": 2.0}
NATIVE = ("negative_prompt", "guidance_scale", "seed", "scheduler")
MOST_FILES, MOST_PART = 17, 2**20
# Seconds for which a finished job is returned to a client that repeats its request.
REMEMBERED = 3600.0


class Generation(BaseModel):
    """The supported fields of a generation. The response header x-sfumato-ignored lists all others."""

    model_config = ConfigDict(extra="allow")

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|\d{2,5}x\d{2,5})$")] | None = "auto"
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = "auto"
    background: Literal["auto", "opaque", "transparent"] | None = "auto"
    input_fidelity: Literal["high", "low"] | None = None
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    user: Annotated[str, Field(max_length=200)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    scheduler: str | None = None
    strength: float | None = None

    @property
    def ignored(self) -> list[str]:
        """The fields that were sent but have no effect."""
        without = [name for name in ("style", "moderation") if getattr(self, name) not in (None, "auto")]
        return sorted([*(self.model_extra or {}), *without])


@router.post("/images/generations")
async def generations(http: Request, asked: Generation) -> Response:
    """Generate images from a prompt."""
    return await _answer(http, asked, {}, "image_generation")


@router.api_route("/images/generations", methods=["OPTIONS"], include_in_schema=False)
def options() -> Response:
    """Answer OPTIONS, which SillyTavern uses to check that the server is running."""
    return Response(status_code=204, headers={"Allow": "POST, OPTIONS"})


@router.post("/images/edits")
async def edits(http: Request) -> Response:
    """Edit an image, sent as a multipart form or as JSON with data URLs."""
    is_json = http.headers.get("content-type", "").startswith("application/json")
    fields = await (_of_json(http) if is_json else _of_form(http))
    images, mask = fields.pop("images"), fields.pop("mask", None)
    if len(images) != 1:
        raise ApiError(400, f"send one image to edit, not {len(images)}", param="image")
    try:
        asked = Generation(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{first['loc'][0]}: {first['msg'].lower()}", param=str(first["loc"][0])) from error
    keep = http.app.state.intake.keep
    more: dict[str, Any] = {"image": await asyncio.to_thread(keep, images[0])}
    if mask is not None:
        more["mask"] = {"file": await asyncio.to_thread(lambda: keep(painted(mask, images[0])))}
    else:
        more["strength"] = {"high": 0.5, "low": 0.8, None: 0.8}[asked.input_fidelity]
    return await _answer(http, asked, more, "image_edit")


async def _of_form(http: Request) -> dict[str, Any]:
    async with http.form(max_files=MOST_FILES, max_part_size=MOST_PART) as form:
        fields: dict[str, Any] = {"images": []}
        for name, value in form.multi_items():
            data = await value.read() if isinstance(value, UploadFile) else value
            if name in ("image", "image[]"):
                fields["images"].append(data if isinstance(data, bytes) else decoded(data))
            elif name == "mask":
                fields["mask"] = data if isinstance(data, bytes) else decoded(data)
            elif isinstance(data, str):
                fields[name] = data
    return fields


async def _of_json(http: Request) -> dict[str, Any]:
    try:
        fields = json.loads(await http.body())
        images = [one["image_url"] for one in fields.pop("images")]
        mask = (fields.pop("mask", None) or {}).get("image_url")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = 'the body of an edit must be {"prompt": …, "images": [{"image_url": "data:image/png;base64,…"}]}'
        raise ApiError(400, told, param="images") from error
    masks = {} if mask is None else {"mask": decoded(str(mask))}
    return fields | {"images": [decoded(str(one)) for one in images], **masks}


@router.get("/models")
def models(http: Request) -> dict[str, Any]:
    """List the models that can generate images."""
    return {"object": "list", "data": [_model(one) for one in _drawing(http.app.state.queue, look=True)]}


@router.get("/models/{name:path}")
def model(http: Request, name: str) -> dict[str, Any]:
    """Return one model."""
    return _model(_named(http.app.state.queue, name))


def _drawing(queue: JobQueue, *, look: bool = False) -> list[Model]:
    return [one for one in queue.models.all(look=look) if one.kind in ("checkpoint", "core-ml")]


def _model(one: Model) -> dict[str, Any]:
    return {"id": one.name, "object": "model", "created": 0, "owned_by": "sfumato"}


def _named(queue: JobQueue, name: str | None) -> Model:
    found = {one.name: one for one in _drawing(queue)}
    if name is None or (name not in found and ALIASES.fullmatch(name)):
        name = queue.models.default
    if name not in found:
        told = f"there is no model {name[:100]!r}; available are {', '.join(list(found)[:10])}"
        raise ApiError(404, told, param="model", code="model_not_found")
    return found[name]


async def _answer(http: Request, asked: Generation, more: dict[str, Any], kind: str) -> Response:
    queue, headers = http.app.state.queue, {}
    job = await asyncio.to_thread(_job, http, asked, more)
    headers = {"x-sfumato-job": job.id}
    if asked.ignored:
        headers["x-sfumato-ignored"] = ", ".join(quote(name[:50]) for name in asked.ignored[:20])
    if asked.stream:
        found = _streamed(http, asked, job.id, kind)
        return StreamingResponse(found, media_type="text/event-stream", headers=headers)
    job = await http.app.state.waiting.ended(job.id, http)
    data = [await asyncio.to_thread(_image, http, asked, key) for key in job.images.values()]
    about = await asyncio.to_thread(_about, queue, asked, job)
    return JSONResponse({"created": int(job.created), "data": data, **about, "usage": _usage(job)}, headers=headers)


def _job(http: Request, asked: Generation, more: dict[str, Any]) -> Job:
    """Return the job for a request: a new one, or the existing one if the client repeats its request."""
    queue: JobQueue = http.app.state.queue
    body = hashlib.sha256(json.dumps([asked.model_dump(), more], sort_keys=True).encode()).hexdigest()
    client = f"openai:{asked.user or ''}"
    if http.headers.get("x-stainless-retry-count", "0") != "0":
        known = queue.store.job_of_body(client, body)
        if (
            known is not None
            and known.state in ("queued", "running", "done")
            and known.created > time.time() - REMEMBERED
        ):
            return known
    model, strength = _named(queue, asked.model), {} if asked.strength is None else {"strength": asked.strength}
    request = http.app.state.intake.request(_request(asked, model) | more | strength | _size(asked, model, more, queue))
    partials = (asked.partial_images or 0) if asked.stream else 0
    return queue.submit(request, model.name, client=client, body=body, partials=partials, preview=False)


def _request(asked: Generation, model: Model) -> dict[str, Any]:
    if asked.background == "transparent":
        raise ApiError(400, "transparent backgrounds are not supported; use opaque", param="background")
    values = {"steps": asked.num_inference_steps} | {name: getattr(asked, name) for name in NATIVE}
    quality = QUALITIES.get(asked.quality or "auto")
    if quality is not None and values["steps"] is None:
        values["steps"] = max(1, round(quality * model.suggested.get("steps", 25)))
    return values | {"prompt": asked.prompt, "count": asked.n or 1}


def _size(asked: Generation, model: Model, more: dict[str, Any], queue: JobQueue) -> dict[str, Any]:
    if asked.size not in (None, "auto"):
        width, height = map(int, asked.size.split("x"))
        if width % 8 or height % 8:
            raise ApiError(400, f"width and height must be multiples of 8, not {asked.size}", param="size")
        return {"width": width, "height": height}
    return fitting(queue.folder / more["image"], model) if "image" in more else {}


def _image(http: Request, asked: Generation, key: str) -> dict[str, Any]:
    queue: JobQueue = http.app.state.queue
    if asked.response_format == "url":
        return {"url": f"{http.url.scheme}://{http.headers['host']}/api/images/{key}/file"}
    if (path := queue.gallery.path_of(key)) is None:
        raise ApiError(404, "the image has been deleted", code="image_not_found")
    data = converted(path, asked.output_format or "png", asked.output_compression)
    return {"b64_json": base64.b64encode(data).decode()}


def _about(queue: JobQueue, asked: Generation, job: Job) -> dict[str, Any]:
    rows = [row for key in job.images.values() if (row := queue.gallery.get(key)) is not None]
    size = f"{rows[0]['width']}x{rows[0]['height']}" if rows else asked.size
    quality = asked.quality if asked.quality in ("low", "medium", "high") else "medium"
    return {"background": "opaque", "output_format": asked.output_format or "png", "quality": quality, "size": size}


def _usage(job: Job) -> dict[str, Any]:
    tokens = int(job.options.get("tokens") or 0)
    details = {"text_tokens": tokens, "image_tokens": 0}
    return {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 0, "total_tokens": tokens}


async def _streamed(http: Request, asked: Generation, id: str, kind: str) -> AsyncIterator[bytes]:
    """Stream partial images, and each image when it is finished."""
    queue: JobQueue = http.app.state.queue
    told = set[int]()
    async for event in http.app.state.waiting.follow(id):
        if event.type == "partial" and event.data["place"] not in told:
            yield _event(f"{kind}.partial_image", await asyncio.to_thread(_partial, asked, event))
        job = await asyncio.to_thread(queue.store.job, id)
        assert job is not None
        for place in sorted(job.images.keys() - told) if event.type in ("drawn", "job") else ():
            told.add(place)
            image = await asyncio.to_thread(_image, http, asked, job.images[place])
            about = await asyncio.to_thread(_about, queue, asked, job)
            more = {"created_at": int(time.time()), "image_index": place, "usage": _usage(job)}
            yield _event(f"{kind}.completed", image | about | more)
        if event.type == "stopping" or (job.ended and job.state != "done"):
            yield b"event: error\ndata: " + json.dumps(described(failed(job))).encode() + b"\n\n"
            return
    yield b"data: [DONE]\n\n"


def _partial(asked: Generation, event: Event) -> dict[str, Any]:
    data = decoded(event.data["image"])
    size = "{}x{}".format(*event.data["size"])
    return {
        "b64_json": base64.b64encode(converted(data, asked.output_format or "png", asked.output_compression)).decode(),
        "partial_image_index": event.data["number"], "image_index": event.data["place"], "created_at": int(time.time()),
        "size": size, "quality": asked.quality or "auto", "background": "opaque",
        "output_format": asked.output_format or "png",
    }  # fmt: skip


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
