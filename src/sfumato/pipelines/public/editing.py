"""Instruction-based editing and depth-guided generation under the ecosystem's names.

Where a callback sees all branches of guidance, they are in Sfumato's order: of nothing, of the image, of image and
prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline, TwoPromptPipeline
from sfumato.pipelines.public.stable_diffusion_xl import PARTS, Output, Size
from sfumato.pipelines.result import ImagePipelineOutput, StableDiffusionXLPipelineOutput
from sfumato.request import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.pipelines.result import StableDiffusionPipelineOutput
    from sfumato.schedulers.noise import Generators

__all__ = [
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
]


def _check_image(image: Any) -> None:
    if image is None:
        raise UsageError("image is missing, which this checkpoint reads; pass one")


class StableDiffusionInstructPix2PixPipeline(OnePromptPipeline, DiffusionPipeline):
    """Edit an image by an instruction (arXiv 2211.09800)."""

    index = Index("StableDiffusionInstructPix2PixPipeline")
    _callback_tensor_inputs = ("latents", "prompt_embeds", "image_latents")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Edit an image as the prompt says; `image_guidance_scale` says how closely it is kept to, at least 1.

        There is guidance only where both scales ask for it. Otherwise as `StableDiffusionImg2ImgPipeline`.
        """
        refuse(unknown, StableDiffusionInstructPix2PixPipeline.__call__)
        _check_image(image)
        return call(self, locals())


class StableDiffusionXLInstructPix2PixPipeline(TwoPromptPipeline, DiffusionPipeline):
    """Edit an image by an instruction, with Stable Diffusion XL or CosXL."""

    index = Index("StableDiffusionXLInstructPix2PixPipeline", PARTS, (), ("force_zeros_for_empty_prompt",))
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids", "image_latents")
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 1.5,
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
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], object] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        **unknown: Any,
    ) -> Output:
        """Edit an image, resized to `height` and `width` or the checkpoint's own size, as the prompt says.

        Otherwise as `StableDiffusionInstructPix2PixPipeline` and `StableDiffusionXLPipeline`.
        """
        refuse(unknown, StableDiffusionXLInstructPix2PixPipeline.__call__)
        _check_image(image)
        own = self.parts.size_of(GenerateRequest(width=width, height=height))
        arguments = {name: value for name, value in locals().items() if name != "own"}
        return call(self, arguments | {"width": own[0], "height": own[1]})


class StableDiffusionDepth2ImgPipeline(OnePromptPipeline, DiffusionPipeline):
    """Image to image that keeps the depth of what is seen."""

    output = ImagePipelineOutput
    index = Index("StableDiffusionDepth2ImgPipeline", absent=("depth_estimator", "feature_extractor"), flags=())
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        depth_map: Tensor | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Redraw an image by words; `depth_map` (B, H, W) says how near each of its pixels is, in any scale.

        The ecosystem's pipeline estimates a map where none is given; here it has to be. Otherwise as
        `StableDiffusionImg2ImgPipeline`.
        """
        refuse(unknown, StableDiffusionDepth2ImgPipeline.__call__)
        _check_image(image)
        if depth_map is None:
            raise UsageError("depth_map is missing, and Sfumato estimates no depth; pass a tensor (B, H, W)")
        return call(self, locals())
