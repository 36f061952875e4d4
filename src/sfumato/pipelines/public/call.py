"""The ecosystem's call: arguments become a request, with callbacks between steps and several output types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError, suggest
from sfumato.images import to_arrays
from sfumato.pipelines.arguments import OLDER, not_here, request_from
from sfumato.pipelines.public.callbacks import StepEnd, older, tensor_names
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from sfumato.request import Framing
from sfumato.values import check_argument, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.request import GenerateRequest

__all__ = ["call"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Arguments of the ecosystem's calls, in any signature, and the matching fields of a request…
REQUEST = {
    "prompt": "prompt",
    "prompt_2": "prompt_2",
    "negative_prompt": "negative_prompt",
    "negative_prompt_2": "negative_prompt_2",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "timesteps": "timesteps",
    "sigmas": "sigmas",
    "strength": "strength",
    "guidance_scale": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "num_images_per_prompt": "count",
    "eta": "eta",
    "clip_skip": "clip_skip",
    "image_guidance_scale": "image_guidance_scale",
    "noise_level": "noise_level",
    "original_inference_steps": "original_inference_steps",
    "denoising_start": "denoising_start",
    "denoising_end": "denoising_end",
}
# … of a `Framing` in one of those fields…
FRAMING = {
    **{name: ("framing", name) for name in Framing.__dataclass_fields__},
    **{f"negative_{name}": ("negative_framing", name) for name in Framing.__dataclass_fields__},
}
# … and of `Given`. The remaining arguments go to `_draw`.
GIVEN = {
    "generator": "generators",
    "latents": "latents",
    "image": "image",
    "mask_image": "mask_image",
    "masked_image_latents": "masked_image_latents",
    "padding_mask_crop": "padding_mask_crop",
    "depth_map": "depth_map",
    "image_embeds": "image_embeds",
    "prompt_embeds": "prompt_embeds",
    "negative_prompt_embeds": "negative_prompt_embeds",
    "pooled_prompt_embeds": "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds": "negative_pooled_prompt_embeds",
    "steered": "steered",
    "ip_adapter_image": "prompt_images",
    "ip_adapter_image_embeds": "prompt_image_embeds",
    "ip_adapter_masks": "prompt_image_masks",
}


def call(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> Any:
    """Run a pipeline's call. arguments: by their names in its signature; `self` and `unknown` are ignored.

    Returns the pipeline's `output`, or its values as a tuple.
    """
    arguments = dict(arguments) | _attention_arguments(arguments)
    given = Given(**{GIVEN[name]: value for name, value in arguments.items() if name in GIVEN})
    if given.padding_mask_crop is not None and arguments["output_type"] != "pil":
        raise UsageError("padding_mask_crop returns PIL images; omit output_type or padding_mask_crop")
    if given.image is not None and pipeline._image_processor is not None:
        given = replace(given, pixels=pipeline.image_processor.preprocess(given.image))
    asked = {REQUEST[name]: value for name, value in arguments.items() if name in REQUEST}
    arguments |= _negative_sizes(pipeline, arguments)
    framed: dict[str, dict[str, Any]] = {}
    for name, (field, part) in FRAMING.items():
        if name in arguments:
            framed.setdefault(field, {})[part] = arguments[name]
    asked |= {field: Framing(**values) for field, values in framed.items()}
    if "scale" in arguments:
        asked["adapter_scale"] = arguments.pop("scale")
    arguments = _with_callback(arguments)
    request = request_from(prompt_embeds=given.prompt_embeds, **asked)
    known = (*REQUEST, *FRAMING, *GIVEN, "self", "unknown", "cross_attention_kwargs", *OLDER)
    how = {name: value for name, value in arguments.items() if name not in known}
    return _draw(pipeline, request, given, **how)


def _negative_sizes(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> dict[str, None]:
    """Return the negative sizes that a call ignores, as in the ecosystem: all of them, or only the crops."""
    if "negative_target_size" not in arguments:
        return {}
    if "strength" in arguments:
        return {} if "aesthetic_score" in pipeline.parts.family.sizes else {"negative_crops_coords_top_left": None}
    names = ("negative_original_size", "negative_target_size")
    every = (*names, "negative_crops_coords_top_left")
    return dict.fromkeys(every) if any(arguments[name] is None for name in names) else {}


def _with_callback(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an older callback among the arguments to an equivalent newer one."""
    told = {name: value for name, value in arguments.get("unknown", {}).items() if name in OLDER} | dict(arguments)
    callback, every = told.get("callback"), told.get("callback_steps")
    if callback is None and "callback_on_step_end" in told:
        return told
    if told.get("callback_on_step_end") is not None:
        raise UsageError("callback and callback_on_step_end cannot be combined; pass callback_on_step_end")
    return told | older(callback, 1 if every is None else every)


def _attention_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `cross_attention_kwargs`: {"scale": 0.5} multiplies all adapters' weights; also takes ip_adapter_masks."""
    given = arguments.get("cross_attention_kwargs")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise UsageError(f"cross_attention_kwargs must be a dict such as {{'scale': 0.5}}, not {shown(given)}")
    if given.keys() - {"scale", "ip_adapter_masks"}:
        raise not_here("cross_attention_kwargs")
    return dict(given)


def _draw(
    pipeline: DiffusionPipeline,
    request: GenerateRequest,
    given: Given,
    *,
    output_type: str,
    return_dict: bool,
    callback_on_step_end: Callback | None,
    callback_on_step_end_tensor_inputs: Sequence[str],
) -> Any:
    check_argument("return_dict", return_dict, bool)
    if not (isinstance(output_type, str) and output_type in OUTPUT_TYPES):
        raise UsageError(
            f"there is no output_type {shown(output_type)}{suggest(output_type, OUTPUT_TYPES)}; "
            "use pil, np, pt or latent"
        )
    callback = callback_on_step_end
    names = tensor_names(callback, callback_on_step_end_tensor_inputs, pipeline._callback_tensor_inputs)
    step_end = None if callback is None else StepEnd(callback, names, pipeline.dtype)
    run = Run(pipeline.parts, pipeline.place, request, given, pipeline.scheduler)
    pipeline._steering = run.steering
    loop = run.latents()
    edited: Tensor | None = None
    with pipeline.progress.bar() as bar:
        while True:
            try:
                step = loop.send(edited)
            except StopIteration as end:
                latents = end.value
                break
            bar.advance(step.index + 1, step.total)
            timestep = run.scheduler.timesteps[run.first + step.index]
            edited = step_end and step_end(pipeline, step, timestep, run)
    if output_type == "latent":
        images: Any = latents.to(pipeline.dtype)
    else:
        draw = {
            "pil": lambda x: [run.task.finish(picture) for picture in run.pictures(x)],
            "np": lambda x: to_arrays(run.pixels(x)),
            "pt": run.pixels,
        }
        images = draw[output_type](latents)
    output = pipeline.output(images, notes=tuple(run.notes))
    if return_dict:
        return output
    return tuple(getattr(output, field.name) for field in fields(output) if field.compare)
