"""The noise the U-Net learns to remove, and a plain sampler for the sheets (v-prediction, Salimans & Ho 2022)."""

from __future__ import annotations

import itertools
import math

import torch
from models import read_text, read_unet
from torch import Tensor, nn

STEPS = 1000
BETAS = (0.00085, 0.012)  # "scaled_linear", as in Stable Diffusion


def alphas() -> Tensor:
    """Cumulative products of 1 - beta, (1000,) float64."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def draw_times(count: int, high_share: float, low: int, generator: torch.Generator) -> Tensor:
    """Timesteps spread evenly over the batch, `high_share` of them in [low, 1000), where the words decide."""
    device = generator.device
    u = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    high = u < high_share
    t = torch.where(high, low + (STEPS - low) * u / high_share, STEPS * (u - high_share) / (1 - high_share))
    return t.long().clamp(0, STEPS - 1)


class Schedule:
    """Levels of noise, resident on a device."""

    def __init__(self, device: torch.device):
        self.a = alphas().sqrt().float().to(device)
        self.s = (1 - alphas()).sqrt().float().to(device)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor, pure: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the v that leads back to x0: x = a x0 + s n, x0 = a x - s v.

        Where `pure`, x is noise alone (the schedule's last step still shows 7 % of the picture, which sampling never
        has).
        """
        a, s = (table[t].view(-1, 1, 1, 1) for table in (self.a, self.s))
        x = torch.where(pure.view(-1, 1, 1, 1), noise, a * x0 + s * noise)
        return x, (a * x - x0) / s


@torch.no_grad()
def sample(
    unet: nn.Module,
    text: nn.Module,
    tokens: Tensor,
    empty: Tensor,
    seed: int,
    *,
    steps: int = 24,
    guidance: float = 4.0,
) -> Tensor:
    """Unit-scale latents for captions (B, T), by DDIM (Song et al. 2020, eq. 12, no noise) from the last step down."""
    device = tokens.device
    config = unet.config
    shape = (len(tokens), config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    words = read_text(text, torch.cat([tokens, empty.expand_as(tokens)]))
    table, times = alphas(), torch.linspace(STEPS - 1, -1, steps + 1).round().long().tolist()
    for now, after in itertools.pairwise(times):
        a, s = math.sqrt(table[now]), math.sqrt(1 - table[now])
        t = torch.full((2 * len(x),), now, device=device)
        with_words, without = read_unet(unet, torch.cat([x, x]), t, words).float().chunk(2)
        v = without + guidance * (with_words - without)
        x0, noise = a * x - s * v, s * x + a * v
        left = float(table[after]) if after >= 0 else 1.0
        x = math.sqrt(left) * x0 + math.sqrt(1 - left) * noise
    return x


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, batch: int = 32) -> Tensor:
    """Unit-scale latents -> pictures in -1..1."""
    parts = latents.div(vae.config.scaling_factor).split(batch)
    return torch.cat([vae.decode(part).sample.float() for part in parts])
