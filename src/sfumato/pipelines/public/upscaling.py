"""Upscalers under the ecosystem's names."""

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

__all__ = ["StableDiffusionLatentUpscalePipeline", "StableDiffusionUpscalePipeline"]


def _check_image(image: Any) -> None:
    if image is None:
        raise UsageError("image is missing, which an upscaler needs; pass one")


class StableDiffusionUpscalePipeline(OnePromptPipeline, DiffusionPipeline):
    """Draw an image four times as large. A large one is drawn in tiles by `generate`, and whole by a call."""

    index = Index(
        "StableDiffusionUpscalePipeline",
        ("vae", "text_encoder", "tokenizer", "unet", "low_res_scheduler", "scheduler"),
        ("watermarker", "safety_checker", "feature_extractor"),
        ("max_noise_level",),
    )
    _optional_components = ["watermarker", "safety_checker", "feature_extractor"]
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
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
        clip_skip: int | None = None,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Enlarge an image that shows what the prompt says; `noise_level` says how far its details may be redrawn."""
        refuse(unknown, StableDiffusionUpscalePipeline.__call__)
        _check_image(image)
        return call(self, locals())


class StableDiffusionLatentUpscalePipeline(OnePromptPipeline, DiffusionPipeline):
    """Draw an image, or what another pipeline left as latents, twice as large."""

    index = Index("StableDiffusionLatentUpscalePipeline", absent=(), flags=())
    output = ImagePipelineOutput
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        negative_prompt: str | Sequence[str] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], object] | None = None,
        callback_steps: int = 1,
        **unknown: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Enlarge an image, or latents (B, 4, h, w); a `guidance_scale` of 0 also leaves the prompt out."""
        refuse(unknown, StableDiffusionLatentUpscalePipeline.__call__)
        _check_image(image)
        arguments = locals()
        if guidance_scale == 0 and prompt is not None:
            arguments = arguments | {"prompt": "" if isinstance(prompt, str) else [""] * len(prompt)}
        return call(self, arguments)
