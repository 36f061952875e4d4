"""Image variations under the ecosystem's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline
from sfumato.pipelines.result import ImagePipelineOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.result import StableDiffusionPipelineOutput
    from sfumato.schedulers.noise import Generators

__all__ = ["StableDiffusionImageVariationPipeline", "StableUnCLIPImg2ImgPipeline"]


class StableDiffusionImageVariationPipeline(DiffusionPipeline):
    """Draw what an image shows once more, without a prompt."""

    index = Index(
        "StableDiffusionImageVariationPipeline",
        ("vae", "image_encoder", "unet", "scheduler"),
        ("safety_checker", "feature_extractor"),
    )
    _optional_components = ["safety_checker"]

    def __call__(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], object] | None = None,
        callback_steps: int = 1,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Images like `image`: a PIL image, a list of them, or a tensor (B, 3, S, S) as an image encoder reads it."""
        refuse(unknown, StableDiffusionImageVariationPipeline.__call__)
        if image is None:
            raise UsageError("image is missing, of which variations are drawn; pass one")
        return call(self, locals() | {"prompt": ""})


class StableUnCLIPImg2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Draw images like another one that show what a prompt says (unCLIP, arXiv 2204.06125)."""

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

    def __call__(
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], object] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        noise_level: int = 0,
        image_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        **unknown: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images like `image`, or like what `image_embeds` (P, D) are of; the higher `noise_level`, the less alike."""
        refuse(unknown, StableUnCLIPImg2ImgPipeline.__call__)
        if (image is None) == (image_embeds is None):
            raise UsageError("pass either an image or image_embeds, of which images like it are drawn")
        prompt = ([""] * len(image) if isinstance(image, list) else "") if prompt is prompt_embeds is None else prompt
        return call(self, locals())
