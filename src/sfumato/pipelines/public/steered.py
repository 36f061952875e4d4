"""The arguments of calls for control networks: control images, scales, and when each network is active."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from sfumato.errors import UsageError
from sfumato.masks import cropped
from sfumato.models import ControlNetUnionModel, T2IAdapter
from sfumato.pipelines.multi_control import Several
from sfumato.pipelines.public.call import call
from sfumato.pipelines.residuals import steered_by, united
from sfumato.preprocess import control_pixels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sfumato.pipelines.pipeline import DiffusionPipeline

__all__ = ["CONTROL", "draw_steered"]

# Arguments for control networks.
CONTROL = (
    "control_mode", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "guess_mode",
    "adapter_conditioning_scale", "adapter_conditioning_factor",
)  # fmt: skip


def draw_steered(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> Any:
    """Run a call with control images, which are its argument `control_image` or, without one, `image`."""
    pipeline.parts.check_whole()
    name = "control_image" if "control_image" in arguments else "image"
    told = {key: value for key, value in arguments.items() if key not in (*CONTROL, name)}
    if isinstance(arguments[name], (list, tuple)) and not arguments[name]:
        raise UsageError(f"{name} is empty; pass the control images")
    nets, images, modes = _networks(pipeline, arguments, name)
    size = _size(told.get("image", images[0]), told, pipeline.parts.vae_scale_factor)
    if told.get("padding_mask_crop") is not None and size is not None:
        if not all(isinstance(one, Image.Image) for one in (*images, told["mask_image"])):
            raise UsageError("padding_mask_crop needs a PIL mask and PIL control images; pass those, or omit it")
        images = [cropped(one, told["mask_image"], size, told["padding_mask_crop"]) for one in images]
    elif "mask_image" not in told:
        size = _size(images[0], told, pipeline.parts.vae_scale_factor)
    every = []
    for net, image, mode, how in zip(nets, images, modes, _hows(pipeline, arguments, len(nets)), strict=True):
        more = {} if mode is None else {"modes": (mode,)}
        every.append(steered_by(net, control_pixels(image, size), **how, **more))
    count = every[0].pictures.shape[0]
    prompts = told["prompt"] if told["prompt"] is not None else told["prompt_embeds"]
    if count > 1 and not (isinstance(prompts, str) or prompts is None) and len(prompts) != count:
        raise UsageError(f"got {count} control images for {len(prompts)} prompts; pass one image, or one per prompt")
    if "image" not in told or "mask_image" in told:
        height, width = every[0].pictures.shape[2:]
        told |= {"height": height, "width": width}
    return call(pipeline, told | {"steered": united(every)})


def _networks(pipeline: DiffusionPipeline, arguments: Mapping[str, Any], name: str) -> tuple[list[Any], ...]:
    """Return the network, the control images, and the mode (or None) for each control input."""
    nets, images = list(pipeline.parts.controls), arguments[name]
    several = isinstance(pipeline.parts.beside, Several)
    if not isinstance(nets[0], ControlNetUnionModel):
        images = _for_each(images, len(nets), _kind(pipeline)) if several else [images]
        return nets, images, [None] * len(nets)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    modes = arguments["control_mode"]
    modes = list(modes) if isinstance(modes, (list, tuple)) else [modes]
    if len(modes) != len(images) or not all(isinstance(mode, int) for mode in modes):
        raise UsageError(
            f"control_mode must have one number for each of the {len(images)} control images; pass a number, or a list"
        )
    if several and len(images) != len(nets):
        raise UsageError(f"got {len(images)} control images for {len(nets)} ControlNets; pass one for each")
    return nets if several else nets * len(images), images, modes


def _kind(pipeline: DiffusionPipeline) -> str:
    return "T2I-Adapter" if pipeline.parts.adapter is not None else "ControlNet"


def _hows(pipeline: DiffusionPipeline, arguments: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the scale, start and end for each network."""
    kind = _kind(pipeline)
    if isinstance(pipeline.parts.controls[0], T2IAdapter):
        scales = _each("adapter_conditioning_scale", arguments, count, kind)
        end = arguments.get("adapter_conditioning_factor", 1.0)
        return [{"scale": scale if end > 0 else 0.0, "end": end} for scale in scales]
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    every = [_each(name, arguments, count, kind, listed=count > 1 or "guidance" in name) for name in names]
    guess = arguments["guess_mode"] or pipeline.parts.controls[0].config.global_pool_conditions
    hows = [{"scale": scale, "start": a, "end": b, "guess": guess} for scale, a, b in zip(*every, strict=True)]
    for one in hows:
        if not 0 <= one["start"] < one["end"] <= 1:
            both = f"control_guidance_start {one['start']:g} and control_guidance_end {one['end']:g}"
            raise UsageError(f"{both} must be from 0 to 1, with the start below the end")
    return hows


def _for_each(images: Any, count: int, kind: str) -> list[Any]:
    """Return the control images for each network, given as a list, or as one list per prompt."""
    if not isinstance(images, (list, tuple)):
        raise UsageError(f"several {kind}s need a list of control images, one for each of the {count}")
    nested = [isinstance(one, (list, tuple)) for one in images]
    every = [list(column) for column in zip(*images, strict=True)] if all(nested) else list(images)
    if len(every) != count:
        raise UsageError(f"got {len(every)} control images for {count} {kind}s; pass one for each")
    return every


def _each(name: str, arguments: Mapping[str, Any], count: int, kind: str, *, listed: bool = True) -> Sequence[float]:
    """Return the value of an argument for each network, given one for each or one for all. listed: allow a list."""
    value = arguments[name]
    if not isinstance(value, (list, tuple)):
        value = [value] * count
    elif not listed:
        raise UsageError(f"{name} must be a single number for a single {kind}")
    if len(value) != count or not all(isinstance(one, (int, float)) for one in value):
        raise UsageError(f"{name} must be a number, or {count} of them, one for each {kind}")
    return value


def _size(image: Any, told: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
    """Return the (width, height) for control images: the requested size or their own, as multiples of the factor."""
    first = image[0] if isinstance(image, (list, tuple)) else image
    if isinstance(first, Image.Image):
        own = first.size
    else:
        pixels = control_pixels(first)
        own = (pixels.shape[3], pixels.shape[2])
    wanted = [told[name] or side for name, side in zip(("width", "height"), own, strict=True)]
    return wanted[0] - wanted[0] % factor, wanted[1] - wanted[1] % factor
