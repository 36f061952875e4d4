"""The stages before and after the loop: words to embeddings, noise or a picture to latents, latents to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError
from sfumato.images import from_pixels
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.vae import AutoencoderKL
from sfumato.schedulers.noise import GaussianNoise
from sfumato.text.prompt import encode_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.pipelines.finite import FiniteWatch
    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.request import GenerateRequest
    from sfumato.schedulers.noise import Generators

__all__ = ["Conditioning", "Given", "decode", "encode_image", "encode_prompt"]

Autoencoder = AutoencoderKL | AutoencoderTiny


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a caller may hand over ready-made beside the request.

    generators: one for the whole batch, one per image, or None; latents (B, C, h, w): the initial noise;
    prompt_embeds and negative_prompt_embeds (P, S, C) in place of the words; image: a picture, array or tensor to
    start from.
    """

    generators: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    image: Any = None


@dataclass(frozen=True)
class Conditioning:
    """Embeddings (B, S, C) of the prompts and, where there is guidance, of the negative ones; and what did not fit."""

    embeds: Tensor
    negative_embeds: Tensor | None
    lost: tuple[str, ...]


def encode_prompt(
    pipeline: DiffusionPipeline, request: GenerateRequest, given: Given, *, guided: bool, watch: FiniteWatch
) -> Conditioning:
    """Encode each prompt once, repeated for each of its pictures. Raises `UsageError` where embeddings do not fit."""
    embeds, lost = _encode(pipeline, request.prompts, request.clip_skip, given.prompt_embeds, watch)
    negative = None
    if guided:
        texts = _negatives(request, embeds.shape[0])
        negative, lost_negative = _encode(pipeline, texts, request.clip_skip, given.negative_prompt_embeds, watch)
        lost += lost_negative
        if negative.shape != embeds.shape:
            raise UsageError(
                f"prompt_embeds {tuple(embeds.shape)} and negative_prompt_embeds {tuple(negative.shape)} "
                "must have the same shape"
            )
        negative = negative.repeat_interleave(request.count, dim=0)
    return Conditioning(embeds.repeat_interleave(request.count, dim=0), negative, tuple(text for text in lost if text))


def _negatives(request: GenerateRequest, prompts: int) -> Sequence[str]:
    return request.negative_prompts if len(request.prompts) == prompts else request.negative_prompts[:1] * prompts


def _encode(
    pipeline: DiffusionPipeline, texts: Sequence[str], clip_skip: int | None, given: Tensor | None, watch: FiniteWatch
) -> tuple[Tensor, tuple[str, ...]]:
    """Embeddings (P, S, C) as the U-Net reads them, the given ones or those of the texts; and what did not fit."""
    encoder, device, dtype = pipeline.text_encoder, pipeline.device, pipeline.dtype
    lost: tuple[str, ...] = ()

    def embeds() -> Tensor:
        nonlocal lost
        if given is not None:
            return given.to(device, dtype)
        encoded = encode_prompts(pipeline.tokenizer, encoder, texts, clip_skip=clip_skip)
        lost = encoded.lost
        return encoded.embeds.to(device, dtype)

    return watch.finite("text encoder", encoder, embeds), lost


@torch.no_grad()
def encode_image(vae: Autoencoder, pixels: Tensor, batch: int, generators: Generators, watch: FiniteWatch) -> Tensor:
    """Pixels (P, 3, H, W) in [-1, 1] -> scaled latents (batch, C, h, w) in float32.

    Latents given in place of pixels (P, 4, h, w) are taken as they are. Raises `UsageError` where P does not divide
    the batch.
    """
    count = pixels.shape[0]
    if batch % count:
        raise UsageError(f"{count} images cannot be shared out to {batch} pictures; give one, or one per prompt")
    if pixels.shape[1] == 4:
        return pixels.float().repeat(batch // count, 1, 1, 1)
    if isinstance(generators, (list, tuple)):
        # Each picture draws with its own generator, so each needs its own copy of the image.
        pixels = pixels.repeat(batch // count, 1, 1, 1)
    # Drawn before, and so only once, however often the picture is encoded.
    noise = None if isinstance(vae, AutoencoderTiny) else _posterior_noise(vae, pixels, generators)

    def encode() -> Tensor:
        encoded: Any = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)
        return encoded[0] if noise is None else encoded[0].at(noise)

    latents = watch.finite("VAE encoder", vae, encode)
    shift = vae.config.shift_factor or 0.0
    latents = (latents.float() - shift) * vae.config.scaling_factor
    return latents.repeat(batch // latents.shape[0], 1, 1, 1)


def _posterior_noise(vae: AutoencoderKL, pixels: Tensor, generators: Generators) -> Tensor:
    height, width = (side // vae.config.scale_factor for side in pixels.shape[2:])
    return GaussianNoise((pixels.shape[0], vae.config.latent_channels, height, width), generators, vae.device)()


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, watch: FiniteWatch) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1]."""
    shift = vae.config.shift_factor or 0.0
    unscaled = latents / vae.config.scaling_factor + shift

    def sample() -> Tensor:
        return vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]

    return from_pixels(watch.finite("VAE decoder", vae, sample))
