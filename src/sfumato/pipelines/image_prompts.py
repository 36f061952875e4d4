"""Image prompts: an IP-Adapter's tokens for the layers that read the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.adapters.files import read_stored
from sfumato.errors import UsageError
from sfumato.files import expanded, file_hash
from sfumato.images import open_image, open_mask
from sfumato.models import CLIPVisionModelWithProjection
from sfumato.models.image_encoder import clip_pixels
from sfumato.models.ip_adapter import ImageTokens, IPAdapter
from sfumato.pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.models import UNet2DConditionModel
    from sfumato.request import ImagePrompt

__all__ = ["Carried", "Seen", "see", "seen_by"]

Scale = float | dict[str, float]


@dataclass(frozen=True, eq=False)
class Carried:
    """A pipeline's IP-Adapter and its scale; for images with masks, optionally one scale per image."""

    adapter: IPAdapter
    scale: Scale | tuple[Scale, ...] = 1.0


@dataclass(frozen=True, eq=False)
class Seen:
    """An IP-Adapter with the tokens of its images.

    nothing, something: tokens (1, T, C) for no image and for the images; scale: for all layers, or by the beginning of
    layer names, with 0 for others; mask: where the images apply.
    """

    adapter: IPAdapter
    nothing: Tensor
    something: Tensor
    scale: Scale = 1.0
    mask: Tensor | None = None

    def told(self, unet: UNet2DConditionModel, branches: tuple[int, int], pictures: int, states: Tensor) -> ImageTokens:
        """Return the tokens for a U-Net call, in the dtype and on the device of `states`.

        branches: the number of branches without and with the image; pictures: the number of images per branch.
        """
        rows = [self.nothing] * branches[0] + [self.something] * branches[1]
        tokens = torch.cat([row.expand(pictures, -1, -1) for row in rows]).to(states)
        matrices = self.adapter.matrices(unet)
        scale: Any = self.scale
        if isinstance(scale, dict):
            every = {module: _begins(f"unet.{name}", scale) for name, module in unet.named_modules()}
            scale = {module: scale[max(found, key=len)] for module, found in every.items() if found}
        return ImageTokens(tokens, matrices, scale, self.mask)


def _begins(name: str, scales: dict[str, float]) -> list[str]:
    return [one for one in scales if f"{name}.".startswith(f"{one}.")]


@torch.no_grad()
def seen_by(
    carried: Sequence[Carried],
    unet: UNet2DConditionModel,
    encoder: CLIPVisionModelWithProjection | None,
    images: Any,
    embeds: Any,
    masks: Any,
    device: torch.device,
) -> tuple[Seen, ...]:
    """Compute the tokens of a call's images for each of a pipeline's IP-Adapters.

    images: one image or a list of images per adapter; embeds: alternatively, embeddings (2 or 1, n, …) per adapter;
    masks: (1, n, H, W) per adapter, for its n images. Raises `UsageError` if the numbers do not match.
    """
    if images is None and embeds is None:
        return ()
    given = embeds if embeds is not None else images
    given = given if isinstance(given, (list, tuple)) else [given]
    if not carried:
        raise UsageError("ip_adapter_image needs an IP-Adapter; load one with load_ip_adapter")
    if len(given) != len(carried):
        raise UsageError(f"got images for {len(given)} of {len(carried)} IP-Adapters; pass images for each adapter")
    every = []
    for i, (one, value) in enumerate(zip(carried, given, strict=True)):
        adapter = one.adapter.to(device, unet.dtype)
        own: Any = value
        pair: Any = own.chunk(2) if embeds is not None and own.shape[0] == 2 else (own, own)
        if embeds is None:
            if encoder is None:
                raise UsageError("ip_adapter_image needs an image encoder; load one with load_ip_adapter")
            ready = isinstance(own, torch.Tensor) and own.ndim == 4
            pixels: Any = own if ready else clip_pixels(own, encoder.config.image_size)
            pair = tuple(row[None] for row in adapter.seen(encoder, pixels, whole=adapter.whole))
        nothing, something = adapter.tokens(*(row.flatten(0, 1) for row in pair))
        count = something.shape[0]
        shown = [None] if masks is None else list(masks[i].reshape(-1, *masks[i].shape[-2:]).to(device))
        scales = one.scale if isinstance(one.scale, tuple) else (one.scale,) * len(shown)
        if len(shown) not in (1, count) or len(scales) != len(shown):
            raise UsageError(
                f"got {len(shown)} masks and {len(scales)} scales for {count} images; pass one for each image"
            )
        sizes = [count // len(shown)] * len(shown)
        rows = zip(nothing.split(sizes), something.split(sizes), scales, shown, strict=True)
        every += [Seen(adapter, a.flatten(0, 1)[None], b.flatten(0, 1)[None], s, mask) for a, b, s, mask in rows]
    return tuple(every)


@torch.no_grad()
def see(
    unet: UNet2DConditionModel, prompts: Sequence[ImagePrompt], device: torch.device
) -> tuple[tuple[Seen, ...], tuple[ImagePrompt, ...]]:
    """Compute the tokens of a request's image prompts in float32. Also returns the prompts with their files' hashes.

    Each encoder is in memory only while it is used. Raises `CheckpointError` if files do not fit each other or the
    U-Net, and `UsageError` if they differ from the recipe's.
    """
    every, told = [], []
    encoders: dict[str, Any] = {}
    for prompt in prompts:
        stored = read_stored(prompt.model)
        adapter = IPAdapter(stored.tensors, stored.where).float()
        if prompt.encoder not in encoders:
            encoders = {prompt.encoder: CLIPVisionModelWithProjection.from_pretrained(
                prompt.encoder, local_files_only=True, torch_dtype=torch.float32
            )}  # fmt: skip
        encoder = encoders[prompt.encoder]
        adapter.check_reads(encoder)
        hashes = [stored.sha256, file_hash(expanded(prompt.image), None), fingerprint(encoder)]
        hashes += [] if prompt.mask is None else [file_hash(expanded(prompt.mask), None)]
        if prompt.hashes not in (None, tuple(hashes)):
            raise UsageError(f"the files of the image prompt {prompt.image} are not those of the recipe; restore them")
        pixels = clip_pixels(open_image(prompt.image), encoder.config.image_size)
        nothing, something = adapter.tokens(*adapter.seen(encoder, pixels, whole=adapter.whole))
        adapter.matrices(unet)
        mask = None
        if prompt.mask is not None:
            mask = torch.from_numpy(np.asarray(open_mask(prompt.mask), dtype=np.float32) / 255).to(device)
        placed = adapter.to(device, unet.dtype)
        every.append(Seen(placed, nothing.to(device), something.to(device), prompt.scale, mask))
        told.append(prompt.replace(hashes=tuple(hashes)))
    return tuple(every), tuple(told)
