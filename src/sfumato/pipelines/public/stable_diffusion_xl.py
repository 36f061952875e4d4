"""Stable Diffusion XL and related models under the ecosystem's names: one signature each.

Sizes are (height, width) and crops (top, left), as in the ecosystem. Its known errors are reproduced, with one
exception: negative sizes apply to every image of a batch, not to every second row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import USUAL, Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import TwoPromptPipeline
from sfumato.pipelines.result import StableDiffusionXLPipelineOutput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.schedulers.noise import Generators

__all__ = ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"]

PARTS = tuple(part for part in USUAL if part != "controlnet")
ABSENT = ("image_encoder", "feature_extractor")
TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
Size = tuple[int, int]
Output = StableDiffusionXLPipelineOutput | tuple[Any]


class StableDiffusionXLPipeline(TwoPromptPipeline, DiffusionPipeline):
    """Text-to-image."""

    index = Index("StableDiffusionXLPipeline", PARTS, ABSENT, ("force_zeros_for_empty_prompt",))
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = TENSORS
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
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
    ) -> Output:
        """Generate images from a prompt; every argument means what it means in the ecosystem.

        For example, a `negative_prompt` of None may mean zeros, while an empty one is encoded
        (`force_zeros_for_empty_prompt`); `clip_skip` does not apply to the negative prompt; negative sizes have an
        effect only if two are given. With `denoising_end` it stops early, so that an image-to-image pipeline can
        continue with `denoising_start`. Returns an object with `.images`, or a tuple with `return_dict=False`. Raises
        `UsageError` for wrong values and `UnknownArgument` for arguments that do not exist.
        """
        refuse(unknown, StableDiffusionXLPipeline.__call__)
        return call(self, locals())


class StableDiffusionXLImg2ImgPipeline(TwoPromptPipeline, DiffusionPipeline):
    """Image-to-image, also for the refiner: the same loop, starting later, from an image or from latents."""

    index = Index(
        "StableDiffusionXLImg2ImgPipeline",
        PARTS,
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
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
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
    ) -> Output:
        """Change an image with a prompt; `strength` is how much to change it, from 0 to 1 (completely).

        `image` is a PIL image, an array in [0, 1], a tensor, latents, or a list of these. With `denoising_start`, it is
        the latents of another pipeline at its `denoising_end`, with the same scheduler and number of steps: no noise is
        added, and `strength` is ignored. `latents` are used unchanged. A U-Net without `aesthetic_score` gets the crops
        of the prompt for the negative prompt too. Otherwise like `StableDiffusionXLPipeline`.
        """
        refuse(unknown, StableDiffusionXLImg2ImgPipeline.__call__)
        if image is None:
            raise UsageError(
                "image is missing, which image-to-image needs; for text-to-image, use StableDiffusionXLPipeline"
            )
        return call(self, locals())
