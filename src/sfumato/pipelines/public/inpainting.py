"""Inpainting under the ecosystem's names, with inpainting checkpoints and plain ones.

As in the ecosystem, the whole result is decoded by the autoencoder, even outside the mask; `generate` restores the
original pixels there. Two differences correct errors of the ecosystem: with one image and a list of generators, each
copy is encoded with its own generator, not with the first; and encoded images are normalized with the mean and standard
deviation of the autoencoder's latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.image_processor import VaeImageProcessor
from sfumato.pipelines.arguments import refuse
from sfumato.pipelines.components import Index
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.public.call import call
from sfumato.pipelines.public.prompts import OnePromptPipeline, TwoPromptPipeline
from sfumato.pipelines.public.stable_diffusion_xl import ABSENT, PARTS, TENSORS, Output, Size
from sfumato.pipelines.result import StableDiffusionXLPipelineOutput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.public.callbacks import Callback
    from sfumato.pipelines.result import StableDiffusionPipelineOutput
    from sfumato.schedulers.noise import Generators

__all__ = ["MASKED", "Masking", "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"]

MASKED = ("mask", "masked_image_latents")


def _check_given(image: Any, mask: Any) -> None:
    if image is None or mask is None:
        missing = "image" if image is None else "mask_image"
        raise UsageError(f"{missing} is missing; inpainting needs an image and a mask, white where it may change")


class Masking:
    """A pipeline that generates within a mask."""

    parts: Parts

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Converts masks to what calls read, and blurs and crops them; it cannot be replaced."""
        how = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
        return VaeImageProcessor(vae_scale_factor=self.parts.vae_scale_factor, **how)

    @mask_processor.setter
    def mask_processor(self, value: object) -> None:
        """Raise `UsageError`."""
        raise UsageError("mask_processor cannot be replaced; for soft masks, use generate() with a Mask")


class StableDiffusionInpaintPipeline(Masking, OnePromptPipeline, DiffusionPipeline):
    """Inpainting."""

    index = Index("StableDiffusionInpaintPipeline")
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", *MASKED)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Change the area that is white in `mask_image`; every argument means what it means in the ecosystem.

        `image` and `mask_image` are resized to `height` and `width`, or else to the checkpoint's own size; the mask is
        then thresholded to black and white. Both are PIL images, arrays or tensors in [0, 1], or lists of these;
        `image` may also be latents. `padding_mask_crop`: generate only the masked area and this many pixels around it,
        enlarged, and paste the result back. Otherwise like `StableDiffusionPipeline`.
        """
        refuse(unknown, StableDiffusionInpaintPipeline.__call__)
        _check_given(image, mask_image)
        return call(self, locals())


class StableDiffusionXLInpaintPipeline(Masking, TwoPromptPipeline, DiffusionPipeline):
    """Inpainting with Stable Diffusion XL."""

    index = Index(
        "StableDiffusionXLInpaintPipeline",
        PARTS,
        ABSENT,
        ("requires_aesthetics_score", "force_zeros_for_empty_prompt"),
    )
    output = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs = (*TENSORS, *MASKED)
    _corrects_scheduler = False

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
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
        """Change the area that is white in `mask_image`.

        Images and masks are as in `StableDiffusionInpaintPipeline`, all else is as in
        `StableDiffusionXLImg2ImgPipeline`. The default strength skips the first step, which keeps a trace of the
        original.
        """
        refuse(unknown, StableDiffusionXLInpaintPipeline.__call__)
        _check_given(image, mask_image)
        return call(self, locals())
