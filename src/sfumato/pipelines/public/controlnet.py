"""ControlNets and T2I-Adapters under the ecosystem's names: Stable Diffusion's calls, with control images.

As in the ecosystem, control images are resized to the requested size, if there is one; several networks take a list.
"""

from __future__ import annotations

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
# Groups of arguments that signatures share, in order.
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
    """A pipeline with one or several control networks."""

    parts: Parts

    @property
    def controlnet(self) -> Any:
        """The ControlNet, or several as one. Accepts a list."""
        return self.parts.controlnet

    @controlnet.setter
    def controlnet(self, value: Any) -> None:
        self.parts = self.parts.having({"controlnet": value, "controls": ()})

    @property
    def adapter(self) -> Any:
        """The T2I-Adapter, or several as one. Accepts a list."""
        return self.parts.adapter

    @adapter.setter
    def adapter(self, value: Any) -> None:
        self.parts = self.parts.having({"adapter": value, "controls": ()})


class _One(_Steered, OnePromptPipeline):
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "control_image")


class _Two(_Steered, TwoPromptPipeline):
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = (*TENSORS, "control_image")
    _corrects_scheduler = False


class StableDiffusionControlNetPipeline(_One, DiffusionPipeline):
    """Text-to-image with control images."""

    index = Index("StableDiffusionControlNetPipeline", PARTS)
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "image")
    __call__ = takes(
        f"prompt image! height width {BEGIN} {ONE} {ONE_TAIL} controlnet_conditioning_scale=1.0 {CONTROLLED} clip_skip "
        f"{STEP_END}",
        draw_steered,
        """Generate images from a prompt and a control image. Default size: the control image's.

        `image` is a PIL image, an array or tensor, or a list with one per prompt; for several ControlNets, a list with
        one of these for each. Scale, start and end are numbers, or lists with one for each ControlNet. Otherwise like
        `StableDiffusionPipeline`. Raises `UsageError`.
        """,
    )


class StableDiffusionControlNetImg2ImgPipeline(_One, DiffusionPipeline):
    """Image-to-image with control images."""

    index = Index("StableDiffusionControlNetImg2ImgPipeline", PARTS)
    _shortens = False
    __call__ = takes(
        f"prompt image! control_image! height width strength=0.8 num_inference_steps {ONE} {ONE_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} clip_skip {STEP_END}",
        draw_steered,
        """Change an image with a prompt and a control image.

        `image` is the image to change, `control_image` the input of the ControlNets. Otherwise like
        `StableDiffusionImg2ImgPipeline` and `StableDiffusionControlNetPipeline`.
        """,
    )


class StableDiffusionControlNetInpaintPipeline(Masking, _One, DiffusionPipeline):
    """Inpainting with control images."""

    index = Index("StableDiffusionControlNetInpaintPipeline", PARTS)
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "control_image", *MASKED)
    __call__ = takes(
        f"prompt image! mask_image! control_image! height width padding_mask_crop strength=1.0 num_inference_steps "
        f"{ONE} {ONE_TAIL} controlnet_conditioning_scale=0.5 {CONTROLLED} clip_skip {STEP_END}",
        draw_steered,
        """Change the area that is white in `mask_image`, with a prompt and a control image.

        Default size: that of `image`. Otherwise like `StableDiffusionInpaintPipeline` and
        `StableDiffusionControlNetPipeline`.
        """,
    )


class StableDiffusionXLControlNetPipeline(_Two, DiffusionPipeline):
    """Text-to-image with Stable Diffusion XL and control images."""

    index = Index("StableDiffusionXLControlNetPipeline", USUAL, ABSENT, ZEROS)
    _callback_tensor_inputs = (*TENSORS, "image")
    __call__ = takes(
        f"prompt prompt_2 image! height width {BEGIN} denoising_end {TWO} {XL_TAIL} controlnet_conditioning_scale=1.0 "
        f"{CONTROLLED} {SIZES} clip_skip {STEP_END}",
        draw_steered,
        """Like `StableDiffusionXLPipeline`, with the control images of `StableDiffusionControlNetPipeline`.""",
    )


class StableDiffusionXLControlNetImg2ImgPipeline(_Two, DiffusionPipeline):
    """Image-to-image with Stable Diffusion XL and control images."""

    index = Index("StableDiffusionXLControlNetImg2ImgPipeline", USUAL, ABSENT, SCORED)
    __call__ = takes(
        f"prompt prompt_2 image! control_image! height width strength=0.8 num_inference_steps {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} {SIZES} {SCORES} clip_skip {STEP_END}",
        draw_steered,
        """Like `StableDiffusionXLImg2ImgPipeline`, with the control images of `StableDiffusionControlNetPipeline`.""",
    )


# In the reference, the pooled embeddings come after the images here.
_INPAINT = (
    f"prompt prompt_2 image! mask_image! control_image! height width padding_mask_crop strength=0.9999 "
    f"num_inference_steps denoising_start denoising_end {TWO} {COMMON} {IMAGES} {POOLED} {OUTPUT} "
    f"controlnet_conditioning_scale=1.0 {CONTROLLED}"
)
_INPAINT_TAIL = f"guidance_rescale {SIZED} {SCORES} clip_skip {STEP_END}"


class StableDiffusionXLControlNetInpaintPipeline(Masking, _Two, DiffusionPipeline):
    """Inpainting with Stable Diffusion XL and control images."""

    index = Index("StableDiffusionXLControlNetInpaintPipeline", USUAL, ABSENT, SCORED)
    _callback_tensor_inputs = (*TENSORS, "control_image", *MASKED)
    __call__ = takes(
        f"{_INPAINT} {_INPAINT_TAIL}",
        draw_steered,
        """Like `StableDiffusionXLInpaintPipeline`, with the control images of `StableDiffusionControlNetPipeline`.

        Default size: that of `image`.
        """,
    )


class StableDiffusionXLControlNetUnionPipeline(_Two, DiffusionPipeline):
    """Text-to-image with Stable Diffusion XL and several kinds of control images for one network."""

    index = Index("StableDiffusionXLControlNetUnionPipeline", USUAL, ABSENT, ZEROS)
    __call__ = takes(
        f"prompt prompt_2 control_image! height width {BEGIN} denoising_end {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=1.0 {CONTROLLED} control_mode {SIZES} clip_skip {STEP_END}",
        draw_steered,
        """Generate images from a prompt and control images, with a `control_mode` for each: the number of its kind.

        0 to 5 are poses, depth, soft edges, lines, normals and segments; in networks that have them, 6 is tile and 7
        inpaint. All control images of a network are active in the same steps. Otherwise like
        `StableDiffusionXLControlNetPipeline`.
        """,
    )


class StableDiffusionXLControlNetUnionImg2ImgPipeline(_Two, DiffusionPipeline):
    """Image-to-image with Stable Diffusion XL and several kinds of control images for one network."""

    index = Index("StableDiffusionXLControlNetUnionImg2ImgPipeline", USUAL, ABSENT, SCORED)
    __call__ = takes(
        f"prompt prompt_2 image! control_image! height width strength=0.8 num_inference_steps {TWO} {XL_TAIL} "
        f"controlnet_conditioning_scale=0.8 {CONTROLLED} control_mode {SIZES} {SCORES} clip_skip {STEP_END}",
        draw_steered,
        """Like `StableDiffusionXLImg2ImgPipeline` and `StableDiffusionXLControlNetUnionPipeline`.""",
    )


class StableDiffusionXLControlNetUnionInpaintPipeline(Masking, _Two, DiffusionPipeline):
    """Inpainting with Stable Diffusion XL and several kinds of control images for one network."""

    index = Index("StableDiffusionXLControlNetUnionInpaintPipeline", USUAL, ABSENT, SCORED)
    _callback_tensor_inputs = (*TENSORS, "control_image", *MASKED)
    __call__ = takes(
        f"{_INPAINT} control_mode {_INPAINT_TAIL}",
        draw_steered,
        """Like `StableDiffusionXLControlNetInpaintPipeline` and `StableDiffusionXLControlNetUnionPipeline`.""",
    )


class StableDiffusionAdapterPipeline(_One, DiffusionPipeline):
    """Text-to-image with control images for T2I-Adapters."""

    index = Index(
        "StableDiffusionAdapterPipeline", ("vae", "text_encoder", "tokenizer", "unet", "adapter", "scheduler")
    )
    __call__ = takes(
        f"prompt image! height width {BEGIN} {ONE} {COMMON} {OLDER} adapter_conditioning_scale clip_skip",
        draw_steered,
        """Generate images from a prompt and a control image, or for several adapters, a list of control images.

        `adapter_conditioning_scale` is a number, or a list with one for each adapter. Otherwise like
        `StableDiffusionPipeline`.
        """,
    )


class StableDiffusionXLAdapterPipeline(_Two, DiffusionPipeline):
    """Text-to-image with Stable Diffusion XL and control images for T2I-Adapters."""

    index = Index("StableDiffusionXLAdapterPipeline", (*XL, "adapter"), ABSENT, ZEROS)
    __call__ = takes(
        f"prompt prompt_2 image! height width {BEGIN} denoising_end {TWO} {COMMON} {POOLED} {IMAGES} {OLDER} "
        f"guidance_rescale {SIZES} adapter_conditioning_scale adapter_conditioning_factor=1.0 clip_skip",
        draw_steered,
        """Like `StableDiffusionXLPipeline`, with the control images of `StableDiffusionAdapterPipeline`.

        `adapter_conditioning_factor` is the fraction of the steps in which they are active.
        """,
    )
