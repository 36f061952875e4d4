"""The stages around the loop: prompt to embeddings, noise or image to latents, latents to image."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import NonFiniteError, UsageError
from sfumato.families import AESTHETIC_SCORES
from sfumato.image_processor import DPTImageProcessor
from sfumato.images import from_pixels
from sfumato.models.image_encoder import clip_pixels
from sfumato.models.seamless import seamless, wrapped
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.vae import AutoencoderKL
from sfumato.pipelines.conditioning import Conditioning
from sfumato.runtime.generators import RandomSource
from sfumato.schedulers.noise import GaussianNoise
from sfumato.text.grammars import subprompts
from sfumato.text.prompt import alike, encode_prompts
from sfumato.text.schedules import Timeline, at_step
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from sfumato.pipelines.conditioning import Branches
    from sfumato.pipelines.finite import FiniteWatch
    from sfumato.pipelines.parts import Parts, Reader
    from sfumato.pipelines.residuals import Steered
    from sfumato.request import Framing, GenerateRequest
    from sfumato.schedulers.noise import Generators
    from sfumato.text.prompt import PromptEmbeds

__all__ = [
    "Given", "by_step", "decode", "encode_image", "encode_prompt", "estimate_depth", "pass_over", "see", "tell_sizes",
]  # fmt: skip

Autoencoder = AutoencoderKL | AutoencoderTiny


@dataclass(frozen=True, kw_only=True)
class Given:
    """Inputs that a caller can supply in addition to the request.

    generators: one for the whole batch, one per image, or None; latents (B, C, h, w): the initial noise, or for
    image-to-image, the initial latents; prompt_embeds, negative_prompt_embeds (P, S, C): instead of prompts, with
    pooled_prompt_embeds, negative_pooled_prompt_embeds (P, C) for families that need them; image: the input image,
    array or tensor; pixels (P, 3, H, W): the same as the autoencoder's input; mask_image: the area to change;
    padding_mask_crop: margin of the crop around it; masked_image_latents (P, 4, h, w): latents of the unchanged area;
    depth_map (P, H, W): larger values are nearer; image_embeds (P, D): from the image encoder; steered: the pipeline's
    own control networks and their images; prompt_images: one image or a list per IP-Adapter; prompt_image_embeds: their
    embeddings; prompt_image_masks (1, n, H, W): where each image applies.
    """

    generators: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    image: Any = None
    pixels: Tensor | None = None
    mask_image: Any = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None
    depth_map: Tensor | None = None
    image_embeds: Tensor | None = None
    steered: tuple[Steered, ...] = ()
    prompt_images: Any = None
    prompt_image_embeds: Any = None
    prompt_image_masks: Any = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for values of the wrong type or shape."""
        generators = self.generators if isinstance(self.generators, (list, tuple)) else [self.generators]
        if self.generators is not None and not all(isinstance(one, RandomSource) for one in generators):
            raise UsageError(
                f"generator must be a torch.Generator, or a list with one per image, not {shown(generators)}"
            )
        shapes = {
            "latents": "B, C, h, w",
            "masked_image_latents": "P, C, h, w",
            "depth_map": "P, H, W",
            "image_embeds": "P, D",
        }
        shapes |= dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), "P, S, C")
        shapes |= dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), "P, C")
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, torch.Tensor) else shown(value)
                raise UsageError(f"{name} must be a tensor of floating-point numbers, not {what}")
            if value.ndim != shape.count(",") + 1 or not value.numel():
                raise UsageError(f"{name} must have the shape ({shape}), not {tuple(value.shape)}")


@dataclass(frozen=True)
class _Told:
    """One branch of guidance: embeddings (P, S, C), pooled prompts (P, C) or None, and words that did not fit.

    notes: about parts of the prompts that were ignored.
    """

    embeds: Tensor
    pooled: Tensor | None
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def by_step(request: GenerateRequest, timeline: Timeline) -> dict[int, GenerateRequest]:
    """Return the request at each step where its prompts change, including the first step (1)."""
    names = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
    texts = {name: value for name in names if (value := getattr(request, name)) is not None}
    if request.prompt_syntax != "a1111" or "[" not in str(texts):
        return {1: request}
    found: dict[int, GenerateRequest] = {}
    for step in range(1, max(2, timeline.steps - timeline.taken + 1)):
        told = {
            name: at_step(value, step, timeline)
            if isinstance(value, str)
            else tuple(at_step(one, step, timeline) for one in value)
            for name, value in texts.items()
        }
        if not found or any(getattr(found[max(found)], name) != value for name, value in told.items()):
            found[step] = request.replace(**told)
    return found


def encode_prompt(
    parts: Parts, request: GenerateRequest, given: Given, device: torch.device, *, guided: bool, watch: FiniteWatch
) -> tuple[Conditioning, tuple[str, ...], tuple[str, ...]]:
    """Encode each prompt once, repeated for each of its images.

    Also returns the words that did not fit, and notes on parts of the prompts that were ignored.

    device: of the U-Net. Raises `UsageError` if embeddings do not fit the model.
    """
    ready = (given.prompt_embeds, given.pooled_prompt_embeds)
    how = {"clip_skip": request.clip_skip, "syntax": request.prompt_syntax}
    joined, weights = _joined_prompts(request)
    told = [_tell(parts, texts, how, ready, device, watch) for texts in joined]
    if guided:
        told.insert(0, _tell_not(parts, request, given, told[0], device, watch))
    if request.prompt_syntax != "plain" and all(one.embeds.shape[1] % parts.prompt_tokens == 0 for one in told):
        every = alike([one.embeds for one in told], parts.prompt_tokens)
        told = [replace(one, embeds=embeds) for one, embeds in zip(told, every, strict=True)]
    _check_told(parts, told)

    def repeated(branches: Iterable[Tensor]) -> Branches:
        return tuple(branch.repeat_interleave(request.count, dim=0) for branch in branches)

    pooled = [one.pooled for one in told if one.pooled is not None]
    lost = tuple(text for one in reversed(told) for text in one.lost if text)
    notes = tuple(dict.fromkeys(note for one in told for note in one.notes))
    weights = repeated(torch.tensor(row, device=device)[:, None, None, None] for row in weights)
    return Conditioning(repeated(one.embeds for one in told), repeated(pooled), weights=weights), lost, notes


def _joined_prompts(request: GenerateRequest) -> tuple[list[list[list[str]]], list[list[float]]]:
    """Split prompts at A1111's `AND`: returns the texts for each text encoder, and weights, once per joined prompt.

    Prompts with fewer parts than others in the batch are padded with their first part, with weight 0. Without `AND`,
    there are no weights.
    """
    every = [[subprompts(one, request.prompt_syntax) for one in texts] for texts in request.texts]
    count = max(len(one) for texts in every for one in texts)
    texts = [[[one[i][0] if i < len(one) else one[0][0] for one in prompts] for prompts in every] for i in range(count)]
    weights = [[one[i][1] if i < len(one) else 0.0 for one in every[0]] for i in range(count)]
    return texts, weights if weights != [[1.0] * len(every[0])] else []


def _tell_not(
    parts: Parts, request: GenerateRequest, given: Given, told: _Told, device: torch.device, watch: FiniteWatch
) -> _Told:
    """Encode the negative branch, for as many prompts as the positive one."""
    ready = (given.negative_prompt_embeds, given.negative_pooled_prompt_embeds)
    if ready[0] is None and request.negative_prompt is None and parts.family.absent_negative == "zeros":
        return _Told(torch.zeros_like(told.embeds), None if told.pooled is None else torch.zeros_like(told.pooled))
    prompts = told.embeds.shape[0]
    texts = [one if len(one) == prompts else one[:1] * prompts for one in request.negative_texts]
    skip = request.clip_skip if parts.family.clip_skip == "both" else None
    skip = skip if request.negative_clip_skip is None else request.negative_clip_skip
    return _tell(parts, texts, {"clip_skip": skip, "syntax": request.prompt_syntax}, ready, device, watch)


def _tell(
    parts: Parts,
    texts: Sequence[Sequence[str]],
    how: dict[str, Any],
    ready: tuple[Tensor | None, Tensor | None],
    device: torch.device,
    watch: FiniteWatch,
) -> _Told:
    """Return one branch: the given embeddings, or the encoded texts, which are one sequence per text encoder."""
    embeds, pooled = (None if one is None else one.to(device, parts.unet.dtype) for one in ready)
    if any(one is not None and not torch.isfinite(one).all() for one in (embeds, pooled)):
        raise NonFiniteError("prompt embeddings", "pass finite ones")
    if embeds is not None:
        return _Told(embeds, pooled)
    every, lost, notes = [], [], []
    for reader, prompts in zip(parts.readers, texts, strict=False):
        encoded = _read(reader, prompts, how | {"embeddings": parts.outfit.all_embeddings}, watch)
        every.append(encoded.embeds.to(device, parts.unet.dtype))
        lost += encoded.lost
        notes += encoded.notes
        if pooled is None and (reader.how.projected or reader.how.pooled) and encoded.pooled is not None:
            pooled = encoded.pooled.to(device, parts.unet.dtype)
    every = every if how["syntax"] == "plain" else alike(every, parts.prompt_tokens)
    return _Told(torch.cat(every, dim=-1), pooled, tuple(lost), tuple(notes))


def _read(reader: Reader, prompts: Sequence[str], how: Mapping[str, Any], watch: FiniteWatch) -> PromptEmbeds:
    """Encode prompts with one text encoder. All values are finite."""
    how = {"layer": reader.how.layer, "normalized": reader.how.normalized, **how}
    found: list[PromptEmbeds] = []

    def encode() -> Tensor:
        found[:] = [encode_prompts(reader.tokenizer, reader.encoder, prompts, **how)]
        embeds, pooled = found[0].embeds, found[0].pooled  # from different layers, and both must be finite
        return embeds if pooled is None else torch.cat([embeds.flatten(1), pooled], dim=1)

    watch.finite(reader.role.replace("_", " "), reader.encoder, encode)
    return found[0]


def _check_told(parts: Parts, told: Sequence[_Told]) -> None:
    shapes = [tuple(one.embeds.shape) for one in reversed(told)]
    if len(set(shapes)) > 1:
        raise UsageError(f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} must have the same shape")
    reads = parts.unet.config.per_block("cross_attention_dim")[0]
    if shapes[0][-1] != reads:
        raise UsageError(f"the embeddings have {shapes[0][-1]} values per token, but this U-Net needs {reads}")
    if parts.family.sizes and any(one.pooled is None for one in told):
        raise UsageError(
            "this model also needs pooled embeddings: pass pooled_prompt_embeds and, with "
            "negative_prompt_embeds, negative_pooled_prompt_embeds"
        )
    counts = [one.pooled.shape[0] for one in told if one.pooled is not None]
    if any(count != shapes[0][0] for count in counts):
        raise UsageError(f"got {shapes[0][0]} prompts and {counts[-1]} pooled_prompt_embeds; pass one per prompt")


def tell_sizes(parts: Parts, request: GenerateRequest, size: tuple[int, int], text: Conditioning) -> Conditioning:
    """Add the size conditioning of a family, for images of `size` (width, height)."""
    names = parts.family.sizes
    if not names:
        return text
    own: dict[str, Any] = {"original_size": size[::-1], "crops_coords_top_left": (0, 0), "target_size": size[::-1]}
    positive = own | {"aesthetic_score": AESTHETIC_SCORES[0]} | _said(request.framing)
    negative = positive | {"aesthetic_score": AESTHETIC_SCORES[1]} | _said(request.negative_framing)
    rows = []
    for values in [negative] * (text.branches - text.prompts) + [positive] * text.prompts:
        numbers = [number for name in names for number in _numbers(values[name])]
        # Always in float32: bfloat16 cannot distinguish 1024 from 1027.
        row = torch.tensor([numbers], dtype=torch.float32, device=text.embeds[0].device)
        rows.append(row.expand(text.pictures, -1))
    return replace(text, sizes=tuple(rows))


def _said(framing: Framing | None) -> dict[str, Any]:
    return {} if framing is None else {name: value for name, value in vars(framing).items() if value is not None}


def _numbers(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


@torch.no_grad()
def encode_image(
    vae: Autoencoder,
    pixels: Tensor,
    batch: int,
    generators: Generators,
    watch: FiniteWatch,
    *,
    sampled: bool = True,
    axes: str | None = None,
) -> Tensor:
    """Pixels (P, 3, H, W) in [-1, 1] -> scaled latents (batch, C, h, w) in float32.

    sampled: sample from the posterior instead of using its mean; axes: along which the image is seamless. Latents
    (P, C, h, w) instead of pixels are returned unchanged. Raises `UsageError` if P does not divide the batch.
    """
    count = pixels.shape[0]
    if batch % count:
        raise UsageError(f"got {count} images for a batch of {batch}; pass one image, or one per prompt")
    if pixels.shape[1] == vae.config.latent_channels != vae.config.in_channels:
        return pixels.float().repeat(batch // count, 1, 1, 1)
    if vae.config.in_channels != pixels.shape[1]:
        raise UsageError(f"this VAE needs images with {vae.config.in_channels} channels; use one for RGB")
    pixels = _for_each(generators, pixels, batch) if sampled else pixels
    # Drawn here, so that it is the same if the image is encoded again.
    noise = _posterior_noise(vae, pixels, generators) if sampled and not isinstance(vae, AutoencoderTiny) else None

    def encode() -> Tensor:
        with _seamless(vae, axes):
            encoded: Any = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)
        if isinstance(vae, AutoencoderTiny):
            return encoded[0]
        return encoded[0].mode() if noise is None else encoded[0].at(noise)

    latents = watch.finite("VAE encoder", vae, encode)
    latents = vae.scaled(latents.float())
    return latents.repeat(batch // latents.shape[0], 1, 1, 1)


def pass_over(vae: Autoencoder, pixels: Tensor, batch: int, generators: Generators) -> None:
    """Draw the random numbers of `encode_image`, where the ecosystem encodes an image that it does not use."""
    if pixels.shape[1] == 3 and not isinstance(vae, AutoencoderTiny):
        _posterior_noise(vae, _for_each(generators, pixels, batch), generators)


def _for_each(generators: Generators, pixels: Tensor, batch: int) -> Tensor:
    """Repeat the pixels for each image of the batch if each has its own generator."""
    several = isinstance(generators, (list, tuple))
    return pixels.repeat(batch // pixels.shape[0], 1, 1, 1) if several else pixels


def _posterior_noise(vae: AutoencoderKL, pixels: Tensor, generators: Generators) -> Tensor:
    height, width = (side // vae.config.scale_factor for side in pixels.shape[2:])
    return GaussianNoise((pixels.shape[0], vae.config.latent_channels, height, width), generators, vae.device)()


@torch.no_grad()
def see(parts: Parts, image: Any, watch: FiniteWatch) -> Tensor:
    """Images in any form, or pixels (P, 3, S, S) from `clip_pixels` -> their embeddings (P, D).

    Raises `UsageError` if the checkpoint has no image encoder.
    """
    encoder = parts.image_encoder
    if encoder is None:
        raise UsageError("this checkpoint needs an image encoder, which is missing; pass image_encoder=…")
    pixels = (
        image if isinstance(image, torch.Tensor) and image.ndim == 4 else clip_pixels(image, encoder.config.image_size)
    )
    pixels = pixels.to(encoder.device)
    return watch.finite("image encoder", encoder, lambda: encoder(pixels.to(encoder.dtype)).image_embeds)


@torch.no_grad()
def estimate_depth(parts: Parts, image: Any, watch: FiniteWatch) -> Tensor:
    """Images in any form -> depth maps (P, H, W) in float32, larger where it is nearer."""
    model: Any = parts.depth_estimator
    prepare = parts.feature_extractor or DPTImageProcessor(size=model.config.image_size)
    pixels = prepare(image).to(model.device)
    return watch.finite("depth estimator", model, lambda: model(pixels.to(model.dtype))).float()


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, watch: FiniteWatch, axes: str | None = None) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1]; axes: along which the image is seamless."""
    unscaled = vae.unscaled(latents)
    # For tiled decoding, a seamless image is padded with its own content, so that tiles blend across its edges.
    margin = vae.tile_latent_min_size // 4 if axes and vae.use_tiling else 0
    unscaled = wrapped(unscaled, margin, margin, axes or "")

    def sample() -> Tensor:
        with _seamless(vae, axes if not margin else None):
            return vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]

    pixels = from_pixels(watch.finite("VAE decoder", vae, sample))
    for axis, dim in (("x", 3), ("y", 2)):
        if margin and axis in (axes or ""):
            cut = margin * vae.config.scale_factor
            pixels = pixels.narrow(dim, cut, latents.shape[dim] * vae.config.scale_factor)
    return pixels


def _seamless(vae: Autoencoder, axes: str | None) -> AbstractContextManager[None]:
    return seamless(vae, axes) if axes else nullcontext()
