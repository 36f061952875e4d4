"""The inputs that every library gets: the same prompts and, for single calls, the same random tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.pipelines.sizes import read_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sfumato.bench.cases import Case

__all__ = ["PROMPT", "TIMESTEP", "Inputs", "call_inputs"]

PROMPT = "portrait photo of an old warrior chief"
TIMESTEP = 500.0


@dataclass(frozen=True)
class Inputs:
    """Input tensors of a network call, float32 on the CPU.

    latents: (1, C, h, w). embeds: (2, S, D), negative prompt and prompt. pooled (2, P) and sizes (2, N) only if the
    U-Net takes them.
    """

    latents: Tensor
    embeds: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def added(self) -> dict[str, Tensor]:
        """The additional conditions, under the U-Net's argument names."""
        given = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return {name: value for name, value in given.items() if value is not None}


def call_inputs(case: Case, folder: Path) -> Inputs:
    """Return random inputs of the case's size for the networks of a checkpoint."""
    sizes = read_sizes(folder)
    unet, side = sizes.unet_config, case.size // sizes.vae_config.scale_factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, sizes.vae_config.latent_channels, side, side, generator=generator)
    width = unet.per_block("cross_attention_dim")[0]
    embeds = torch.randn(2, sizes.tokens, width, generator=generator)
    if unet.addition_embed_type is None:
        return Inputs(latents, embeds)
    wide = sizes.text_encoder_configs[-1].projection_dim
    numbers = ((unet.projection_class_embeddings_input_dim or 0) - wide) // (unet.addition_time_embed_dim or 1)
    framing = torch.tensor([case.size, case.size, 0, 0, case.size, case.size][:numbers], dtype=torch.float32)
    return Inputs(latents, embeds, torch.randn(2, wide, generator=generator), framing.repeat(2, 1))
