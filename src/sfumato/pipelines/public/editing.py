"""Instruction-based editing and depth-guided generation under the ecosystem's names.

Callbacks receive the branches of guidance in Sfumato's order: unconditional, image only, image and prompt.
"""

from __future__ import annotations

from typing import Any

from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline, TwoPromptPipeline
from sfumato.pipelines.public.signatures import COMMON, SIZED, takes
from sfumato.pipelines.public.stable_diffusion_xl import PARTS
from sfumato.pipelines.result import ImagePipelineOutput, StableDiffusionXLPipelineOutput
from sfumato.request import GenerateRequest

__all__ = [
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
]


def _edit_sized(pipeline: DiffusionPipeline, told: dict[str, Any]) -> Any:
    """Edit an image at the requested size, or else at the checkpoint's own."""
    width, height = pipeline.parts.size_of(GenerateRequest(width=told["width"], height=told["height"]))
    return call(pipeline, told | {"width": width, "height": height})


class StableDiffusionInstructPix2PixPipeline(OnePromptPipeline, DiffusionPipeline):
    """Instruction-based image editing (arXiv 2211.09800)."""

    index = Index("StableDiffusionInstructPix2PixPipeline")
    _callback_tensor_inputs = ("latents", "prompt_embeds", "image_latents")

    __call__ = takes(
        "prompt image! num_inference_steps=100 guidance_scale=7.5 image_guidance_scale=1.5 negative_prompt "
        f"{COMMON} output_type return_dict callback_on_step_end callback_on_step_end_tensor_inputs "
        "cross_attention_kwargs",
        call,
        """Edit an image as the prompt says; `image_guidance_scale` is how closely to follow the image, at least 1.

        Guidance is applied only if both scales request it. Otherwise like `StableDiffusionImg2ImgPipeline`.
        """,
    )


class StableDiffusionXLInstructPix2PixPipeline(TwoPromptPipeline, DiffusionPipeline):
    """Instruction-based image editing with Stable Diffusion XL or CosXL."""

    index = Index("StableDiffusionXLInstructPix2PixPipeline", PARTS, (), ("force_zeros_for_empty_prompt",))
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids", "image_latents")
    _corrects_scheduler = False

    __call__ = takes(
        "prompt prompt_2 image! height width num_inference_steps=100 denoising_end guidance_scale=5.0 "
        f"image_guidance_scale=1.5 negative_prompt negative_prompt_2 {COMMON} pooled_prompt_embeds "
        "negative_pooled_prompt_embeds output_type return_dict callback callback_steps cross_attention_kwargs "
        f"guidance_rescale {SIZED}",
        _edit_sized,
        """Edit an image, resized to `height` and `width` or the checkpoint's own size, as the prompt says.

        Otherwise like `StableDiffusionInstructPix2PixPipeline` and `StableDiffusionXLPipeline`.
        """,
    )


class StableDiffusionDepth2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Image-to-image that preserves the depth of the scene."""

    output = ImagePipelineOutput
    index = Index("StableDiffusionDepth2ImgPipeline", (*Index.parts, "depth_estimator", "feature_extractor"), (), ())
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask")

    __call__ = takes(
        "prompt image! depth_map strength=0.8 num_inference_steps guidance_scale=7.5 negative_prompt "
        "num_images_per_prompt eta generator prompt_embeds negative_prompt_embeds output_type return_dict "
        "cross_attention_kwargs clip_skip callback_on_step_end callback_on_step_end_tensor_inputs",
        call,
        """Change an image with a prompt; `depth_map` (B, H, W) is how near each pixel is, on any scale.

        Without it, `depth_estimator` estimates it. Otherwise like `StableDiffusionImg2ImgPipeline`.
        """,
    )
