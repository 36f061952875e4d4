"""Upscalers under the ecosystem's names."""

from __future__ import annotations

from typing import Any

from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline
from sfumato.pipelines.public.signatures import COMMON, takes
from sfumato.pipelines.result import ImagePipelineOutput

__all__ = ["StableDiffusionLatentUpscalePipeline", "StableDiffusionUpscalePipeline"]


def _enlarge_latents(pipeline: DiffusionPipeline, told: dict[str, Any]) -> Any:
    prompt = told["prompt"]
    if told["guidance_scale"] == 0 and prompt is not None:
        told["prompt"] = "" if isinstance(prompt, str) else [""] * len(prompt)
    return call(pipeline, told)


class StableDiffusionUpscalePipeline(OnePromptPipeline, DiffusionPipeline):
    """Enlarge an image four times. For large images, `generate` works in tiles; a call processes the whole image."""

    index = Index(
        "StableDiffusionUpscalePipeline",
        ("vae", "text_encoder", "tokenizer", "unet", "low_res_scheduler", "scheduler"),
        ("watermarker", "safety_checker", "feature_extractor"),
        ("max_noise_level",),
    )
    _optional_components = ["watermarker", "safety_checker", "feature_extractor"]
    _corrects_scheduler = False

    __call__ = takes(
        f"prompt image! num_inference_steps=75 guidance_scale=9.0 noise_level=20 negative_prompt {COMMON} "
        "output_type return_dict callback callback_steps cross_attention_kwargs clip_skip",
        call,
        """Enlarge an image, guided by a prompt that describes it; `noise_level` is how much its details may change.""",
    )


class StableDiffusionLatentUpscalePipeline(OnePromptPipeline, DiffusionPipeline):
    """Enlarge an image, or another pipeline's latents, two times."""

    index = Index("StableDiffusionLatentUpscalePipeline", absent=(), flags=())
    output = ImagePipelineOutput
    _corrects_scheduler = False

    __call__ = takes(
        "prompt image! num_inference_steps=75 guidance_scale=9.0 negative_prompt generator latents "
        "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds output_type "
        "return_dict callback callback_steps",
        _enlarge_latents,
        """Enlarge an image, or latents (B, 4, h, w). With a `guidance_scale` of 0, the prompt is ignored.""",
    )
