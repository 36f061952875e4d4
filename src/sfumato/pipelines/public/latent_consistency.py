"""Latent consistency models under the ecosystem's names: few steps, with guidance as an input."""

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

__all__ = ["LatentConsistencyModelImg2ImgPipeline", "LatentConsistencyModelPipeline"]

TENSORS = ("latents", "denoised", "prompt_embeds")


def _check_distilled(pipeline: DiffusionPipeline, other: str) -> None:
    if not pipeline.parts.distilled:
        raise UsageError(f"this U-Net has no guidance embedding, so it was not distilled for few steps; use {other}")


class LatentConsistencyModelPipeline(OnePromptPipeline, DiffusionPipeline):
    """Text-to-image in few steps (arXiv 2310.04378). Callbacks receive `latents`, `denoised` and `prompt_embeds`."""

    index = Index("LatentConsistencyModelPipeline")
    _callback_tensor_inputs = TENSORS
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
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
        """Generate images from a prompt; every argument means what it means in the ecosystem.

        `original_inference_steps`: the number of steps in distillation, from which the schedule is taken. Returns an
        object with `.images`, or a tuple with `return_dict=False`. Raises `UsageError` for wrong values, and for a
        U-Net without a guidance embedding; `UnknownArgument` for arguments that do not exist.
        """
        refuse(unknown, LatentConsistencyModelPipeline.__call__)
        _check_distilled(self, "StableDiffusionPipeline")
        return call(self, locals())


class LatentConsistencyModelImg2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Image-to-image in few steps, on a shorter schedule instead of the end of the full one."""

    index = Index("LatentConsistencyModelImg2ImgPipeline")
    _shortens = True
    _callback_tensor_inputs = TENSORS
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
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
        """Change an image with a prompt. Runs all steps, starting at the timestep for `strength`.

        Otherwise like `LatentConsistencyModelPipeline`.
        """
        refuse(unknown, LatentConsistencyModelImg2ImgPipeline.__call__)
        if image is None:
            raise UsageError("image is missing, which image-to-image needs; for text-to-image, use the other pipeline")
        _check_distilled(self, "StableDiffusionImg2ImgPipeline")
        return call(self, locals())
