"""ControlNet under the ecosystem's names: Stable Diffusion's signatures plus control images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import USUAL, Index
from sfumato.pipelines.multi_control import MultiControlNetModel
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline, TwoPromptPipeline
from sfumato.pipelines.public.stable_diffusion_xl import ABSENT, TENSORS
from sfumato.pipelines.residuals import Steered
from sfumato.pipelines.result import StableDiffusionXLPipelineOutput
from sfumato.preprocess import control_pixels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sfumato.models import ControlNetModel
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.pipelines.result import StableDiffusionPipelineOutput
    from sfumato.schedulers.noise import Generators

__all__ = [
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetPipeline",
]

Size = tuple[int, int]
Images = StableDiffusionXLPipelineOutput | tuple[Any]
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler")


class _Controlled:
    """A pipeline with a ControlNet, or several."""

    parts: Parts

    @property
    def controlnet(self) -> ControlNetModel | MultiControlNetModel | None:
        """The ControlNet, or several as one; a list of them may be assigned."""
        return self.parts.controlnet

    @controlnet.setter
    def controlnet(self, value: Any) -> None:
        self.parts = replace(self.parts, controlnet=value, controls=())


def _controlled(pipeline: DiffusionPipeline, arguments: Mapping[str, Any], name: str, **more: Any) -> Any:
    """Draw what a call says whose control images are its argument `name`; more: arguments in the place of others."""
    told = {key: value for key, value in arguments.items() if key not in (*CONTROL, name)} | more
    nets, images = pipeline.parts.controls, arguments[name]
    if images is None or (isinstance(images, (list, tuple)) and not images):
        raise UsageError(f"{name} is missing; pass the control image")
    several = isinstance(pipeline.parts.controlnet, MultiControlNetModel)
    images = _for_each(images, len(nets)) if several else [images]
    size = _size(images[0], told, pipeline.parts.vae_scale_factor)
    scales = _each("controlnet_conditioning_scale", arguments, len(nets), several=several)
    starts = _each("control_guidance_start", arguments, len(nets), several=True)
    ends = _each("control_guidance_end", arguments, len(nets), several=True)
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            both = f"control_guidance_start {start:g} and control_guidance_end {end:g}"
            raise UsageError(f"{both} must be from 0 to 1, with the start below the end")
    guess = arguments["guess_mode"] or nets[0].config.global_pool_conditions
    steered = tuple(
        Steered(net, control_pixels(image, size), scale=scale, start=start, end=end, guess=guess)
        for net, image, scale, start, end in zip(nets, images, scales, starts, ends, strict=True)
    )
    count = steered[0].pictures.shape[0]
    prompts = told["prompt"] if told["prompt"] is not None else told["prompt_embeds"]
    if count > 1 and not (isinstance(prompts, str) or prompts is None) and len(prompts) != count:
        raise UsageError(f"got {count} control images for {len(prompts)} prompts; pass one image, or one per prompt")
    height, width = steered[0].pictures.shape[2:]
    if "image" not in told:
        told |= {"height": height, "width": width}
    return call(pipeline, told | {"steered": steered})


CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "guess_mode")


def _for_each(images: Any, count: int) -> list[Any]:
    """The images of each network: a list of them, or a list for each prompt of such lists."""
    if not isinstance(images, (list, tuple)):
        raise UsageError(f"several ControlNets need a list of control images, one for each of the {count}")
    nested = [isinstance(one, (list, tuple)) for one in images]
    every = [list(column) for column in zip(*images, strict=True)] if all(nested) else list(images)
    if len(every) != count:
        raise UsageError(f"got {len(every)} control images for {count} ControlNets; pass one for each")
    return every


def _each(name: str, arguments: Mapping[str, Any], count: int, *, several: bool) -> list[float]:
    """The value of an argument for each network, where one may stand for all."""
    value = arguments[name]
    if not isinstance(value, (list, tuple)):
        value = [value] * count
    elif not several:
        raise UsageError(f"{name} must be a number, as there is one ControlNet")
    if len(value) != count or not all(isinstance(one, (int, float)) for one in value):
        raise UsageError(f"{name} must be a number, or {count} of them, one for each ControlNet")
    return list(value)


def _size(image: Any, told: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
    """Width and height that control images are resized to: as asked for, else their own in multiples of the factor."""
    first = image[0] if isinstance(image, (list, tuple)) else image
    if isinstance(first, Image.Image):
        own = first.size
    else:
        pixels = control_pixels(first)
        own = (pixels.shape[3], pixels.shape[2])
    wanted = [told[name] or side for name, side in zip(("width", "height"), own, strict=True)]
    return wanted[0] - wanted[0] % factor, wanted[1] - wanted[1] % factor


class StableDiffusionControlNetPipeline(_Controlled, OnePromptPipeline, DiffusionPipeline):
    """Text to image, steered by pictures."""

    index = Index("StableDiffusionControlNetPipeline", PARTS)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Generate images from words and a control image, whose size they have unless height and width say another.

        `image` is a PIL image, an array or tensor, or a list with one per prompt; of several ControlNets a list with
        one of these for each. Scale, start and end are numbers, or lists with one for each ControlNet. Otherwise as
        `StableDiffusionPipeline`. Raises `UsageError`.
        """
        refuse(unknown, StableDiffusionControlNetPipeline.__call__)
        return _controlled(self, locals(), "image")


class StableDiffusionControlNetImg2ImgPipeline(_Controlled, OnePromptPipeline, DiffusionPipeline):
    """Image to image, steered by pictures."""

    index = Index("StableDiffusionControlNetImg2ImgPipeline", PARTS)
    _shortens = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Redraw an image by words and a control image.

        `image` is what is redrawn, `control_image` what the ControlNets read. Otherwise as
        `StableDiffusionImg2ImgPipeline` and `StableDiffusionControlNetPipeline`.
        """
        refuse(unknown, StableDiffusionControlNetImg2ImgPipeline.__call__)
        _check_image(image, "StableDiffusionControlNetPipeline")
        return _controlled(self, locals(), "control_image")


def _check_image(image: Any, other: str) -> None:
    if image is None:
        raise UsageError(f"image is missing, which image-to-image needs; for text-to-image, use {other}")


class StableDiffusionXLControlNetPipeline(_Controlled, TwoPromptPipeline, DiffusionPipeline):
    """Text to image with Stable Diffusion XL, steered by pictures."""

    index = Index("StableDiffusionXLControlNetPipeline", USUAL, ABSENT, ("force_zeros_for_empty_prompt",))
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = TENSORS
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> Images:
        """As `StableDiffusionXLPipeline`, with the control images of `StableDiffusionControlNetPipeline`."""
        refuse(unknown, StableDiffusionXLControlNetPipeline.__call__)
        arguments = locals()
        absent = negative_original_size is None or negative_target_size is None
        names = ("negative_original_size", "negative_crops_coords_top_left", "negative_target_size")
        return _controlled(self, arguments, "image", **dict.fromkeys(names if absent else ()))


class StableDiffusionXLControlNetImg2ImgPipeline(_Controlled, TwoPromptPipeline, DiffusionPipeline):
    """Image to image with Stable Diffusion XL, steered by pictures."""

    index = Index(
        "StableDiffusionXLControlNetImg2ImgPipeline",
        USUAL,
        ABSENT,
        ("requires_aesthetics_score", "force_zeros_for_empty_prompt"),
    )
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = TENSORS
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> Images:
        """As `StableDiffusionXLImg2ImgPipeline`, with the control images of `StableDiffusionControlNetPipeline`."""
        refuse(unknown, StableDiffusionXLControlNetImg2ImgPipeline.__call__)
        arguments = locals()
        _check_image(image, "StableDiffusionXLControlNetPipeline")
        crops = {} if "aesthetic_score" in self.parts.family.sizes else {"negative_crops_coords_top_left": None}
        return _controlled(self, arguments, "control_image", **crops)
