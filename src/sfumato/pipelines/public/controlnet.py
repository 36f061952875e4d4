"""ControlNets and T2I-Adapters under the ecosystem's names: the calls of Stable Diffusion's pipelines, and pictures.

As there, control images have the size that is asked for, or their own; of several networks there is a list of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfumato.pipelines.components import USUAL, Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.inpainting import MASKED, Masking
from sfumato.pipelines.public.prompts import OnePromptPipeline, TwoPromptPipeline
from sfumato.pipelines.public.signatures import COMMON, CONTROLLED, SIZED, takes
from sfumato.pipelines.public.stable_diffusion_xl import ABSENT, TENSORS
from sfumato.pipelines.public.stable_diffusion_xl import PARTS as XL
from sfumato.pipelines.public.steered import draw_steered
from sfumato.pipelines.result import StableDiffusionXLPipelineOutput

if TYPE_CHECKING:
    from sfumato.pipelines.parts import Parts

__all__ = [
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
]

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler")
ZEROS, SCORED = ("force_zeros_for_empty_prompt",), ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
# What calls have in common, in their order.
IMAGES = "ip_adapter_image ip_adapter_image_embeds"
POOLED = "pooled_prompt_embeds negative_pooled_prompt_embeds"
OUTPUT = "output_type return_dict cross_attention_kwargs"
STEP_END = "callback_on_step_end callback_on_step_end_tensor_inputs"
OLDER = "output_type return_dict callback callback_steps cross_attention_kwargs"
NEGATIVE_SIZES = "negative_original_size negative_crops_coords_top_left negative_target_size"
SIZES = f"{SIZED} {NEGATIVE_SIZES}"
SCORES = "aesthetic_score negative_aesthetic_score"
BEGIN = "num_inference_steps timesteps sigmas"
ONE, TWO = "guidance_scale=7.5 negative_prompt", "guidance_scale=5.0 negative_prompt negative_prompt_2"
ONE_TAIL, XL_TAIL = f"{COMMON} {IMAGES} {OUTPUT}", f"{COMMON} {POOLED} {IMAGES} {OUTPUT}"


class _Steered:
    """A pipeline with a network beside its U-Net, or several."""

    parts: Parts

    @property
    def controlnet(self) -> Any:
        """The ControlNet, or several as one; a list of them may be assigned."""
        return self.parts.controlnet

    @controlnet.setter
    def controlnet(self, value: Any) -> None:
        self.parts = replace(self.parts, controlnet=value, controls=())

    @property
    def adapter(self) -> Any:
        """The T2I-Adapter, or several as one; a list of them may be assigned."""
        return self.parts.adapter

    @adapter.setter
    def adapter(self, value: Any) -> None:
        self.parts = replace(self.parts, adapter=value, controls=())


class _One(_Steered, OnePromptPipeline):
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "control_image")


class _Two(_Steered, TwoPromptPipeline):
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = (*TENSORS, "control_image")
    _corrects_scheduler = False


class StableDiffusionControlNetPipeline(_One, DiffusionPipeline):
    """Text to image, steered by pictures."""

    index = Index("StableDiffusionControlNetPipeline", PARTS)
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "image")
    __call__ = takes(
        f"prompt image! height width {BEGIN} {ONE} {ONE_TAIL} controlnet_conditioning_scale=1.0 {CONTROLLED} clip_skip "
        f"{STEP_END}",
        draw_steered,
        """Generate images from words and a control image, whose size they have unless height and width say another.

        `image` is a PIL image, an array or tensor, or a list with one per prompt; of several ControlNets a list with
        one of these for each. Scale, start and end are numbers, or lists with one for each ControlNet. Otherwise as
        `StableDiffusionPipeline`. Raises `UsageError`.
        """,
    )


class StableDiffusionControlNetImg2ImgPipeline(_One, DiffusionPipeline):
    """Image to image, steered by pictures."""

    index = Index("StableDiffusionControlNetImg2ImgPipeline", PARTS)
    _shortens = False
    __call__ = takes(
        f"prompt image! control_image! height width strength=0.8 num_inference_steps {ONE} {ONE_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} clip_skip {STEP_END}",
        draw_steered,
        """Redraw an image by words and a control image.

        `image` is what is redrawn, `control_image` what the ControlNets read. Otherwise as
        `StableDiffusionImg2ImgPipeline` and `StableDiffusionControlNetPipeline`.
        """,
    )


class StableDiffusionControlNetInpaintPipeline(Masking, _One, DiffusionPipeline):
    """Paint a part of an image, steered by pictures."""

    index = Index("StableDiffusionControlNetInpaintPipeline", PARTS)
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "control_image", *MASKED)
    __call__ = takes(
        f"prompt image! mask_image! control_image! height width padding_mask_crop strength=1.0 num_inference_steps "
        f"{ONE} {ONE_TAIL} controlnet_conditioning_scale=0.5 {CONTROLLED} clip_skip {STEP_END}",
        draw_steered,
        """Paint by words and a control image what `mask_image` shows in white.

        Images have the size of `image` unless height and width say another. Otherwise as
        `StableDiffusionInpaintPipeline` and `StableDiffusionControlNetPipeline`.
        """,
    )


class StableDiffusionXLControlNetPipeline(_Two, DiffusionPipeline):
    """Text to image with Stable Diffusion XL, steered by pictures."""

    index = Index("StableDiffusionXLControlNetPipeline", USUAL, ABSENT, ZEROS)
    _callback_tensor_inputs = (*TENSORS, "image")
    __call__ = takes(
        f"prompt prompt_2 image! height width {BEGIN} denoising_end {TWO} {XL_TAIL} controlnet_conditioning_scale=1.0 "
        f"{CONTROLLED} {SIZES} clip_skip {STEP_END}",
        draw_steered,
        """As `StableDiffusionXLPipeline`, with the control images of `StableDiffusionControlNetPipeline`.""",
    )


class StableDiffusionXLControlNetImg2ImgPipeline(_Two, DiffusionPipeline):
    """Image to image with Stable Diffusion XL, steered by pictures."""

    index = Index("StableDiffusionXLControlNetImg2ImgPipeline", USUAL, ABSENT, SCORED)
    __call__ = takes(
        f"prompt prompt_2 image! control_image! height width strength=0.8 num_inference_steps {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} {SIZES} {SCORES} clip_skip {STEP_END}",
        draw_steered,
        """As `StableDiffusionXLImg2ImgPipeline`, with the control images of `StableDiffusionControlNetPipeline`.""",
    )


# The reference has the pooled embeddings behind the images here.
_INPAINT = (
    f"prompt prompt_2 image! mask_image! control_image! height width padding_mask_crop strength=0.9999 "
    f"num_inference_steps denoising_start denoising_end {TWO} {COMMON} {IMAGES} {POOLED} {OUTPUT} "
    f"controlnet_conditioning_scale=1.0 {CONTROLLED}"
)
_INPAINT_TAIL = f"guidance_rescale {SIZED} {SCORES} clip_skip {STEP_END}"


class StableDiffusionXLControlNetInpaintPipeline(Masking, _Two, DiffusionPipeline):
    """Paint a part of an image with Stable Diffusion XL, steered by pictures."""

    index = Index("StableDiffusionXLControlNetInpaintPipeline", USUAL, ABSENT, SCORED)
    _callback_tensor_inputs = (*TENSORS, "control_image", *MASKED)
    __call__ = takes(
        f"{_INPAINT} {_INPAINT_TAIL}",
        draw_steered,
        """As `StableDiffusionXLInpaintPipeline`, with the control images of `StableDiffusionControlNetPipeline`.

        Images have the size of `image` unless height and width say another.
        """,
    )


class StableDiffusionXLControlNetUnionPipeline(_Two, DiffusionPipeline):
    """Text to image with Stable Diffusion XL, steered by several kinds of pictures that one network reads."""

    index = Index("StableDiffusionXLControlNetUnionPipeline", USUAL, ABSENT, ZEROS)
    __call__ = takes(
        f"prompt prompt_2 control_image! height width {BEGIN} denoising_end {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=1.0 {CONTROLLED} control_mode {SIZES} clip_skip {STEP_END}",
        draw_steered,
        """Generate images from words and control images, with a `control_mode` for each: the number of its kind.

        0 to 5 are poses, depth, soft edges, lines, normals and segments; in networks that have them, 6 is tile and 7
        inpaint. All pictures of a network are read in the same steps. Otherwise as
        `StableDiffusionXLControlNetPipeline`.
        """,
    )


class StableDiffusionXLControlNetUnionImg2ImgPipeline(_Two, DiffusionPipeline):
    """Image to image with Stable Diffusion XL, steered by several kinds of pictures that one network reads."""

    index = Index("StableDiffusionXLControlNetUnionImg2ImgPipeline", USUAL, ABSENT, SCORED)
    __call__ = takes(
        f"prompt prompt_2 image! control_image! height width strength=0.8 num_inference_steps {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} control_mode {SIZES} {SCORES} clip_skip {STEP_END}",
        draw_steered,
        """As `StableDiffusionXLImg2ImgPipeline` and `StableDiffusionXLControlNetUnionPipeline`.""",
    )


class StableDiffusionXLControlNetUnionInpaintPipeline(Masking, _Two, DiffusionPipeline):
    """Paint a part of an image with Stable Diffusion XL, steered by several kinds of pictures."""

    index = Index("StableDiffusionXLControlNetUnionInpaintPipeline", USUAL, ABSENT, SCORED)
    _callback_tensor_inputs = (*TENSORS, "control_image", *MASKED)
    __call__ = takes(
        f"{_INPAINT} control_mode {_INPAINT_TAIL}",
        draw_steered,
        """As `StableDiffusionXLControlNetInpaintPipeline` and `StableDiffusionXLControlNetUnionPipeline`.""",
    )


class StableDiffusionAdapterPipeline(_One, DiffusionPipeline):
    """Text to image, steered by pictures that T2I-Adapters read."""

    index = Index(
        "StableDiffusionAdapterPipeline", ("vae", "text_encoder", "tokenizer", "unet", "adapter", "scheduler")
    )
    __call__ = takes(
        f"prompt image! height width {BEGIN} {ONE} {COMMON} {OLDER} adapter_conditioning_scale clip_skip",
        draw_steered,
        """Generate images from words and what an adapter reads, a picture or, of several adapters, a list of them.

        `adapter_conditioning_scale` is a number, or a list with one for each adapter. Otherwise as
        `StableDiffusionPipeline`.
        """,
    )


class StableDiffusionXLAdapterPipeline(_Two, DiffusionPipeline):
    """Text to image with Stable Diffusion XL, steered by pictures that T2I-Adapters read."""

    index = Index("StableDiffusionXLAdapterPipeline", (*XL, "adapter"), ABSENT, ZEROS)
    __call__ = takes(
        f"prompt prompt_2 image! height width {BEGIN} denoising_end {TWO} {COMMON} {POOLED} {IMAGES} {OLDER} "
        f"guidance_rescale {SIZES} adapter_conditioning_scale adapter_conditioning_factor=1.0 clip_skip",
        draw_steered,
        """As `StableDiffusionXLPipeline`, with the pictures of `StableDiffusionAdapterPipeline`.

        `adapter_conditioning_factor` is the share of the steps in which they steer.
        """,
    )
