"""Stable Diffusion 1.x and 2.x under the ecosystem's names: one signature each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.pipelines.result import StableDiffusionPipelineOutput
    from sfumato.schedulers.noise import Generators

__all__ = ["StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"]


class StableDiffusionPipeline(OnePromptPipeline, DiffusionPipeline):
    """Text-to-image."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Generate images from a prompt; every argument means what it means in the ecosystem.

        Returns an object with `.images`, or a tuple with `return_dict=False`. Raises `UsageError` for wrong values and
        `UnknownArgument` for arguments that do not exist.
        """
        refuse(unknown, StableDiffusionPipeline.__call__)
        return call(self, locals())


class StableDiffusionImg2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Image-to-image: the same loop, starting later, from an image."""

    index = Index("StableDiffusionImg2ImgPipeline")
    _shortens = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Change an image with a prompt; `strength` is how much to change it, from 0 to 1 (completely).

        `image` is a PIL image, an array in [0, 1], a tensor, or a list of these. Otherwise like
        `StableDiffusionPipeline`.
        """
        refuse(unknown, StableDiffusionImg2ImgPipeline.__call__)
        if image is None:
            raise UsageError(
                "image is missing, which image-to-image needs; for text-to-image, use StableDiffusionPipeline"
            )
        return call(self, locals())
