"""What everybody is given: the same words, and for single calls the same random tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sfumato.pipelines.sizes import read_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sfumato.bench.cases import Case

__all__ = ["PROMPT", "TIMESTEP", "call_inputs"]

PROMPT = "portrait photo of an old warrior chief"
TIMESTEP = 500.0


def call_inputs(case: Case, folder: Path) -> tuple[Tensor, Tensor]:
    """Latents (1, C, h, w), and embeddings (2, S, D) of a negative prompt and a prompt; float32, on the CPU."""
    sizes = read_sizes(folder)
    side = case.size // sizes.vae_config.scale_factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, sizes.vae_config.latent_channels, side, side, generator=generator)
    return latents, torch.randn(2, sizes.tokens, sizes.text_encoder_config.hidden_size, generator=generator)
