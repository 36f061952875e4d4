"""Image variations under the ecosystem's names."""

from __future__ import annotations

from typing import Any

from sfumato.errors import UsageError
from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline
from sfumato.pipelines.public.signatures import COMMON, takes
from sfumato.pipelines.result import ImagePipelineOutput

__all__ = ["StableDiffusionImageVariationPipeline", "StableUnCLIPImg2ImgPipeline"]


def _vary(pipeline: DiffusionPipeline, told: dict[str, Any]) -> Any:
    return call(pipeline, told | {"prompt": ""})


def _liken(pipeline: DiffusionPipeline, told: dict[str, Any]) -> Any:
    image = told["image"]
    if (image is None) == (told["image_embeds"] is None):
        raise UsageError("pass either an image or image_embeds, but not both")
    if told["prompt"] is told["prompt_embeds"] is None:
        told["prompt"] = [""] * len(image) if isinstance(image, list) else ""
    return call(pipeline, told)


class StableDiffusionImageVariationPipeline(DiffusionPipeline):
    """Image variations without a prompt."""

    index = Index(
        "StableDiffusionImageVariationPipeline",
        ("vae", "image_encoder", "unet", "scheduler"),
        ("safety_checker", "feature_extractor"),
    )
    _optional_components = ["safety_checker"]

    __call__ = takes(
        "image! height width num_inference_steps guidance_scale=7.5 num_images_per_prompt eta generator "
        "latents output_type return_dict callback callback_steps",
        _vary,
        """Generate variations of `image`: a PIL image, a list, or a tensor (B, 3, S, S), the image encoder's input.""",
    )


class StableUnCLIPImg2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Image variations with a prompt (unCLIP, arXiv 2204.06125)."""

    index = Index(
        "StableUnCLIPImg2ImgPipeline",
        (
            *("image_encoder", "image_normalizer", "image_noising_scheduler"),
            *("tokenizer", "text_encoder", "unet", "scheduler", "vae"),
        ),
        ("feature_extractor",),
        (),
    )
    output = ImagePipelineOutput
    _optional_components = []
    _corrects_scheduler = False

    __call__ = takes(
        f"image prompt height width num_inference_steps=20 guidance_scale=10 negative_prompt {COMMON} "
        "output_type return_dict callback callback_steps cross_attention_kwargs noise_level=0 image_embeds "
        "clip_skip",
        _liken,
        """Generate variations of `image` or of `image_embeds` (P, D); more different with a higher `noise_level`.""",
    )
