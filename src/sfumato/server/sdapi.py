"""AUTOMATIC1111's `/sdapi/v1`: the part that clients use.

Settings of a payload that have no effect are listed in the response's `warnings`. Settings that would change the whole
image (scripts, a second pass in img2img) are refused. `skip` ends the whole job, like `interrupt`. All images are kept.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from sfumato.errors import UsageError
from sfumato.metadata.names import names
from sfumato.metadata.samplers import SAMPLERS, SPACINGS
from sfumato.metadata.told import Told, request_of
from sfumato.request import GenerateRequest
from sfumato.server.errors import ApiError
from sfumato.server.images import inverted
from sfumato.server.intake import decoded

if TYPE_CHECKING:
    from collections.abc import Callable

    from sfumato.jobs.models import Model
    from sfumato.jobs.queue import JobQueue
    from sfumato.jobs.store import Job
    from sfumato.server.intake import Intake

__all__ = [
    "ImageToImage", "PngInfo", "TextToImage", "img2img", "interrupt", "loras", "memory", "options", "png_info",
    "progress", "refresh", "router", "sd_models", "set_options", "txt2img", "vaes",
]  # fmt: skip

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])

CLIENT = "sdapi"
# Fields that only affect how A1111 handles files, or that have no effect unless other fields are set.
HARMLESS = {
    "save_images", "do_not_save_samples", "do_not_save_grid", "script_args", "eta", "s_churn", "s_tmax", "s_tmin",
    "s_noise", "s_min_uncond", "seed_resize_from_h", "seed_resize_from_w", "hr_checkpoint_name", "firstphase_width",
    "firstphase_height", "comments", "infotext", "override_settings_restore_afterwards", "mask_blur_x", "mask_blur_y",
    "inpainting_fill", "include_init_images", "resize_mode", "mask_blur", "inpaint_full_res",
    "inpaint_full_res_padding", "inpainting_mask_invert", "initial_noise_multiplier", "image_cfg_scale",
    "refiner_switch_at", "force_task_id", "disable_extra_networks", "mask_round", "latent_mask",
}  # fmt: skip
OPTIONS = {"samples_format": "png", "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 0}


class TextToImage(BaseModel):
    """The supported fields, with A1111's defaults."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int = -1
    subseed: int = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    cfg_scale: float = 7.0
    width: Annotated[int, Field(ge=8, le=16384)] = 512
    height: Annotated[int, Field(ge=8, le=16384)] = 512
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[int, Field(ge=1, le=100)] = 1
    n_iter: Annotated[int, Field(ge=1, le=100)] = 1
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    script_name: str | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = 0.75
    enable_hr: bool | None = False
    hr_scale: Annotated[float, Field(ge=1, le=16)] = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    hr_resize_x: Annotated[int, Field(ge=0, le=16384)] = 0
    hr_resize_y: Annotated[int, Field(ge=0, le=16384)] = 0
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    styles: list[str] | None = None
    tiling: bool | None = False
    restore_faces: bool | None = False
    send_images: bool = True


class ImageToImage(TextToImage):
    """The supported fields of image-to-image."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    mask_blur: Annotated[int, Field(ge=0, le=255)] = 4
    inpainting_mask_invert: bool = False
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=2048)] = 0


class PngInfo(BaseModel):
    """An image in base64."""

    image: str


@router.post("/txt2img")
async def txt2img(http: Request, asked: TextToImage) -> dict[str, Any]:
    """Generate images from a prompt."""
    return await _answer(http, asked)


@router.post("/img2img")
async def img2img(http: Request, asked: ImageToImage) -> dict[str, Any]:
    """Generate images from an image, or in a masked area of it."""
    return await _answer(http, asked)


async def _answer(http: Request, asked: TextToImage) -> dict[str, Any]:
    job, warnings = await asyncio.to_thread(_submitted, http, asked)
    try:
        job = await http.app.state.waiting.ended(job.id, http)
    except ApiError as error:
        if error.code != "cancelled":  # an interrupted job returns the images that are finished
            raise
        job = http.app.state.queue.store.job(job.id) or job
    return await asyncio.to_thread(_told, http, asked, job, warnings)


def _submitted(http: Request, asked: TextToImage) -> tuple[Job, list[str]]:
    _refuse(asked)
    queue: JobQueue = http.app.state.queue
    intake: Intake = http.app.state.intake
    settings = {**_options(http), **(asked.override_settings or {})}
    model = _named(queue, str(settings["sd_model_checkpoint"]))
    request, notes = request_of(_as_told(asked, settings))
    warnings = [note for note in notes if "made from another image" not in note]
    extra = {name for name in asked.model_extra or {} if name not in HARMLESS}
    warnings += [f"{name} has no effect" for name in sorted(extra | ({"styles"} if asked.styles else set()))]
    values: dict[str, Any] = request.to_dict() | {"count": asked.batch_size * asked.n_iter}
    if (vae := settings["sd_vae"]) not in ("Automatic", "None"):
        values["vae"] = vae
    if isinstance(asked, ImageToImage):
        values["image"] = asked.init_images[0]
        if asked.mask:
            crop = asked.inpaint_full_res_padding if asked.inpaint_full_res else None
            file = intake.keep(inverted(decoded(asked.mask))) if asked.inpainting_mask_invert else asked.mask
            values["mask"] = {"file": file, "edge": asked.mask_blur, "crop": crop}
    return queue.submit(intake.request(values), model.name, client=CLIENT, preview=True), warnings


def _refuse(asked: TextToImage) -> None:
    scripts = asked.alwayson_scripts or {}
    used = [name for name, told in scripts.items() if not isinstance(told, dict) or any(told.get("args") or ())]
    if used or asked.script_name:
        told = ", ".join([*used, *([asked.script_name] if asked.script_name else [])])[:200]
        raise ApiError(422, f"A1111 scripts are not supported: {told}", param="alwayson_scripts")
    if asked.enable_hr and isinstance(asked, ImageToImage):
        raise ApiError(422, "enable_hr is only supported in txt2img; set it to false", param="enable_hr")


def _as_told(asked: TextToImage, settings: dict[str, Any]) -> Told:
    """Return the payload as the settings that A1111 would write into an image."""
    fields = {
        "Steps": asked.steps, "Sampler": asked.sampler_name or asked.sampler_index or "Euler",
        "Schedule type": asked.scheduler or "Automatic", "CFG scale": asked.cfg_scale,
        "Size": f"{asked.width}x{asked.height}", "Clip skip": settings["CLIP_stop_at_last_layers"],
    }  # fmt: skip
    if re.search(rf" ({'|'.join(SPACINGS)})$", str(fields["Sampler"])):
        fields["Schedule type"] = None  # part of the sampler's name, as before A1111 1.9
    if asked.seed >= 0:
        fields["Seed"] = asked.seed
    if asked.subseed_strength:
        fields |= {"Variation seed": max(0, asked.subseed), "Variation seed strength": asked.subseed_strength}
    if asked.tiling or asked.restore_faces:
        fields |= {"Tiling": bool(asked.tiling), "Face restoration": bool(asked.restore_faces)}
    if isinstance(asked, ImageToImage) or asked.enable_hr:
        fields["Denoising strength"] = asked.denoising_strength
    if asked.enable_hr:
        sides = f"{asked.hr_resize_x}x{asked.hr_resize_y}"
        fields |= {
            "Hires upscale": asked.hr_scale, "Hires upscaler": asked.hr_upscaler or "Latent",
            "Hires steps": asked.hr_second_pass_steps or None, "Hires resize": None if sides == "0x0" else sides,
            "Hires sampler": asked.hr_sampler_name, "Hires schedule type": asked.hr_scheduler,
            "Hires prompt": asked.hr_prompt or None, "Hires negative prompt": asked.hr_negative_prompt or None,
        }  # fmt: skip
    if settings.get("eta_noise_seed_delta"):
        fields["ENSD"] = settings["eta_noise_seed_delta"]
    texts = {key: str(value) for key, value in fields.items() if value is not None}
    return Told("AUTOMATIC1111", asked.prompt, asked.negative_prompt or None, texts)


def _named(queue: JobQueue, title: str) -> Model:
    """Return a model by its name, or by its title in A1111's form, with a hash in brackets."""
    name = re.sub(r" \[[0-9a-f]+\]$", "", title).removesuffix(".safetensors")
    try:
        return queue.models.get(name, "checkpoint", "core-ml")
    except UsageError as error:
        raise ApiError(404, str(error), param="sd_model_checkpoint", code="model_not_found") from error


def _told(http: Request, asked: TextToImage, job: Job, warnings: list[str]) -> dict[str, Any]:
    from sfumato.metadata.carriers import read_carried

    gallery = http.app.state.queue.gallery
    paths = [path for key in job.images.values() if (path := gallery.path_of(key)) is not None]
    texts = [read_carried(path, whole=False).texts.get("parameters", "") for path in paths]
    request = GenerateRequest.from_dict(job.request)
    seeds, prompts = list(request.seeds), list(request.prompts) * request.count
    info = {
        "prompt": asked.prompt, "all_prompts": prompts, "negative_prompt": asked.negative_prompt or "",
        "all_negative_prompts": [asked.negative_prompt or ""] * len(seeds), "seed": seeds[0], "all_seeds": seeds,
        "subseed": asked.subseed, "all_subseeds": [asked.subseed] * len(seeds),
        "subseed_strength": asked.subseed_strength, "width": asked.width, "height": asked.height,
        "sampler_name": asked.sampler_name or asked.sampler_index or "Euler", "cfg_scale": asked.cfg_scale,
        "steps": asked.steps, "batch_size": asked.batch_size, "sd_model_name": job.model, "sd_model_hash": "",
        "denoising_strength": getattr(asked, "denoising_strength", None), "extra_generation_params": {},
        "index_of_first_image": 0, "infotexts": texts, "styles": asked.styles or [], "clip_skip": 1,
        "job_timestamp": str(int(job.created)), "restore_faces": False, "is_using_inpainting_conditioning": False,
    }  # fmt: skip
    images = [base64.b64encode(path.read_bytes()).decode() for path in paths] if asked.send_images else []
    echo = asked.model_dump(exclude={"init_images", "mask"})
    return {"images": images, "parameters": echo, "info": json.dumps(info), "warnings": [*warnings, *job.notes]}


@router.get("/progress")
def progress(http: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """Return the progress of the running job."""
    queue: JobQueue = http.app.state.queue
    waiting = queue.store.count("queued", "running")
    running = queue.store.jobs("running", most=1)
    told = queue.progress.get(running[0].id, {}) if running else {}
    step, total, count = told.get("step", 0), told.get("total", 0), 1
    if running:
        count = GenerateRequest.from_dict(running[0].request).batch_size
    place = told.get("place", 0)
    state = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": running[0].id if running else "",
        "job_count": waiting and max(waiting, count), "job_timestamp": "0", "job_no": place, "sampling_step": step,
        "sampling_steps": total,
    }  # fmt: skip
    preview = None if skip_current_image else told.get("preview")
    done = (place + step / total) / count if total else (0.01 if waiting else 0.0)
    return {
        "progress": min(done, 0.99), "eta_relative": told.get("seconds_left", 0.0), "state": state,
        "current_image": preview.partition(",")[2] if preview else None, "textinfo": told.get("stage"),
    }  # fmt: skip


@router.post("/interrupt")
@router.post("/skip")
def interrupt(http: Request) -> dict[str, Any]:
    """Cancel the running jobs of this API's clients. Other clients' jobs continue."""
    queue: JobQueue = http.app.state.queue
    for job in queue.store.jobs("running", client=CLIENT):
        queue.cancel(job.id)
    return {}


def _options(http: Request) -> dict[str, Any]:
    kept = getattr(http.app.state, "sdapi", {})
    return {"sd_model_checkpoint": http.app.state.queue.models.default, **OPTIONS, **kept}


@router.get("/options")
def options(http: Request) -> dict[str, Any]:
    """Return the settings that apply to payloads without their own."""
    return _options(http)


@router.post("/options")
def set_options(http: Request, asked: dict[str, Any]) -> dict[str, Any]:
    """Change settings. Unsupported settings are ignored, so that clients can send all of A1111's."""
    known = {name: asked[name] for name in _options(http) if asked.get(name) is not None}
    if "sd_model_checkpoint" in known:
        known["sd_model_checkpoint"] = _named(http.app.state.queue, str(known["sd_model_checkpoint"])).name
    for name in ("CLIP_stop_at_last_layers", "eta_noise_seed_delta"):
        if type(known.get(name, 0)) is not int:
            raise ApiError(422, f"{name} must be a whole number", param=name)
    http.app.state.sdapi = {**getattr(http.app.state, "sdapi", {}), **known}
    return {}


@router.get("/sd-models")
def sd_models(http: Request) -> list[dict[str, Any]]:
    """List the models that can generate images."""
    found = [one for one in http.app.state.queue.models.all(look=True) if one.kind in ("checkpoint", "core-ml")]
    none = {"hash": None, "sha256": None, "config": None}
    return [{"title": one.name, "model_name": one.name, "filename": one.name, **none} for one in found]


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
def refresh(http: Request) -> dict[str, Any]:
    """Look for new models."""
    http.app.state.queue.models.all(look=True)
    return {}


@router.get("/loras")
def loras(http: Request) -> list[dict[str, Any]]:
    """List the LoRAs that prompts can use as `<lora:name:weight>`."""
    found = [one.name.rpartition("/")[2] for one in http.app.state.queue.models.all() if one.kind == "lora"]
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in found]


@router.get("/sd-vae")
def vaes(http: Request) -> list[dict[str, Any]]:
    """List the VAEs that the setting `sd_vae` can name."""
    found = [one.name for one in http.app.state.queue.models.all() if one.kind == "vae"]
    return [{"model_name": name, "filename": name} for name in found]


@router.get("/memory")
def memory() -> dict[str, Any]:
    """Return this machine's memory in bytes."""
    import psutil

    found = psutil.virtual_memory()
    return {
        "ram": {"free": found.available, "used": found.used, "total": found.total},
        "cuda": {"error": "unavailable"},
    }


@router.post("/png-info")
def png_info(http: Request, asked: PngInfo) -> dict[str, Any]:
    """Return the settings stored in an image."""
    told = http.app.state.intake.texts(decoded(asked.image))
    return {"info": told.get("parameters", ""), "items": told, "parameters": told}


# Constant responses, with A1111's names. No embeddings are loaded, and A1111 scripts are not supported.
FIXED: dict[str, Any] = {
    "samplers": [{"name": one.a1111, "aliases": [one.name], "options": {}} for one in SAMPLERS],
    "schedulers": [
        {"name": name.lower().replace(" ", "_"), "label": name, "aliases": None, "default_rho": -1}
        for name in ("Automatic", *SPACINGS) if name[0].isupper() and name != "Normal"
    ],
    "upscalers": [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 1}
        for name in ("None", "Lanczos")
    ],
    "latent-upscale-modes": [{"name": name} for name in names()["upscalers"] if name.startswith("Latent")],
    "embeddings": {"loaded": {}, "skipped": {}}, "scripts": {"txt2img": [], "img2img": []},
    "sd-modules": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [], "prompt-styles": [],
}  # fmt: skip


def _always(answer: Any) -> Callable[[], Any]:
    return lambda: answer


for _path, _list in FIXED.items():
    router.add_api_route(f"/{_path}", _always(_list), name=_path)
