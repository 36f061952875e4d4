"""Image prompts: an IP-Adapter's tokens for the layers that read the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfumato.adapters.files import read_stored
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import expanded, file_hash
from sfumato.images import open_image
from sfumato.models import CLIPVisionModelWithProjection
from sfumato.models.image_encoder import clip_pixels
from sfumato.models.ip_adapter import ImageTokens, IPAdapter
from sfumato.pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.models import UNet2DConditionModel
    from sfumato.request import ImagePrompt

__all__ = ["Seen", "see"]


@dataclass(frozen=True, eq=False)
class Seen:
    """An adapter, what it makes of no image and of an image, (1, T, C) each, and how strongly and where it is read."""

    adapter: IPAdapter
    nothing: Tensor
    something: Tensor
    scale: float = 1.0
    mask: Tensor | None = None

    def told(self, unet: UNet2DConditionModel, branches: tuple[int, int], pictures: int, states: Tensor) -> ImageTokens:
        """For a context of so many branches of so many images, first those that do not see the image; as states are."""
        rows = [self.nothing] * branches[0] + [self.something] * branches[1]
        tokens = torch.cat([row.expand(pictures, -1, -1) for row in rows]).to(states)
        return ImageTokens(tokens, self.adapter.matrices(unet), self.scale, self.mask)


@torch.no_grad()
def see(
    unet: UNet2DConditionModel, prompts: Sequence[ImagePrompt], device: torch.device
) -> tuple[tuple[Seen, ...], tuple[ImagePrompt, ...]]:
    """What each adapter makes of its image, in float32, and the prompts with the hashes of their files.

    The encoder is in memory for as long as it is used. Raises `CheckpointError` for files that do not fit each other or
    the U-Net, and `UsageError` for others than a recipe says.
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
        gives = encoder.config.hidden_size if adapter.plus else encoder.config.projection_dim
        if gives != adapter.reads:
            raise CheckpointError(
                f"{stored.where} reads {adapter.reads} numbers of an image, and the encoder {prompt.encoder} gives "
                f"{gives}; give the encoder that the adapter was trained with"
            )
        hashes = [stored.sha256, file_hash(expanded(prompt.image), None), fingerprint(encoder)]
        hashes += [] if prompt.mask is None else [file_hash(expanded(prompt.mask), None)]
        if prompt.hashes not in (None, tuple(hashes)):
            raise UsageError(f"the files of the image prompt {prompt.image} are not those of the recipe; restore them")
        pixels = clip_pixels(open_image(prompt.image), encoder.config.image_size)
        nothing, something = adapter.tokens(encoder, pixels)
        adapter.matrices(unet)
        mask = None
        if prompt.mask is not None:
            mask = torch.from_numpy(np.asarray(open_image(prompt.mask).convert("L"), dtype=np.float32) / 255).to(device)
        placed = adapter.to(device, unet.dtype)
        every.append(Seen(placed, nothing.to(device), something.to(device), prompt.scale, mask))
        told.append(prompt.replace(hashes=tuple(hashes)))
    return tuple(every), tuple(told)
