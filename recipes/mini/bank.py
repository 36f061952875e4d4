"""Scenes painted and encoded as they are needed, for the relatives: those of WORK/scenes, or thought up on the spot."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from captions import tokens_of
from common import load, need
from compose import Sprites
from diffusion import Schedule, draw_times
from encode import encode
from models import SCALING_FACTOR, build_vae
from scenes import Writer, scene
from torch import Tensor
from train_vae import scene_rows


class Bank:
    """Batches of noisy latents with their captions, as functions of the seed and the step.

    `change` is done to the pictures; `more` makes of pictures (B, 3, H, W) and the step what else is kept of them.
    """

    def __init__(self, row: SimpleNamespace, work: Path, device: torch.device):
        self.row, self.device = row, device
        self.writer, self.sprites = Writer(row, work), Sprites.of(work, device)
        self.vae = build_vae(row).to(device, memory_format=torch.channels_last).eval()
        self.vae.load_state_dict(load(need(work / "vae_final.pt", "encode.py"))["model"])
        self.empty = torch.from_numpy(tokens_of(work, [""])).long().to(device)
        self.schedule, self.dropout = Schedule(device), row.caption_dropout
        self.change: Callable[[Tensor], Tensor] = lambda x: x
        self.more: Callable[[Tensor, int], tuple[Tensor, ...]] = lambda x, step: ()
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self.ready = [torch.from_numpy(some) for some in scene_rows(work)[:2]] if (work / "scenes").exists() else None

    def written(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Scenes (B, COLUMNS) and tokens of their captions (B, V, T)."""
        if self.ready is not None:
            chosen = (step * count + torch.arange(count)) % len(self.ready[0])
            return self.ready[0][chosen].to(self.device), self.ready[1][chosen].long().to(self.device)
        rng, rows, ids = random.Random(9_000_000 + step), [], []
        while len(rows) < count:
            numbers, texts, _ = scene(self.writer.books[False], rng)
            spelled = self.writer.tokens(rng.choice(texts))
            if spelled is not None:
                rows.append(numbers)
                ids.append([spelled])
        return torch.tensor(rows, device=self.device), torch.tensor(ids, device=self.device)

    def latents(self, x: Tensor) -> Tensor:
        """Unit-scale latents of pictures."""
        return encode(self.vae, x) * SCALING_FACTOR

    def noised(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, times and targets."""
        t = draw_times(len(x0), self.row.high_share, self.row.high_from, generator)
        pure = (t >= 970) & (torch.rand(len(x0), generator=generator, device=self.device) < 0.5)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        x, v = self.schedule.noised(x0, t, noise, pure)
        return x.contiguous(memory_format=torch.channels_last), t, v

    def seen(self, step: int, count: int) -> tuple[Tensor, ...]:
        """Latents, tokens (B, V, T) and what else is kept; where the budget's `painted` is set, so many in turn."""
        place = step % self.row.painted if self.row.painted else step
        if place in self.kept:
            return self.kept[place]
        rows, tokens = self.written(place, count)
        pictures = self.change(self.sprites.paint(rows))
        made = self.latents(pictures), tokens, *self.more(pictures, place)
        if self.row.painted:
            self.kept[place] = made
        return made

    def captioned(self, step: int, count: int) -> tuple[torch.Generator, tuple[Tensor, ...]]:
        """What is random in this step, and latents, tokens of one caption each (B, T) and what else is kept."""
        generator = torch.Generator(self.device).manual_seed(self.row.seed * 1_000_003 + step)
        latents, tokens, *more = self.seen(step, count)
        variant = torch.randint(tokens.shape[1], (count,), generator=generator, device=self.device)
        return generator, (latents, tokens[torch.arange(count, device=self.device), variant], *more)

    def noisy(self, step: int, count: int) -> tuple[Tensor, ...]:
        """Noisy latents, times, tokens (a share of them those of no caption), targets and what else is kept."""
        generator, (latents, tokens, *more) = self.captioned(step, count)
        dropped = torch.rand(count, generator=generator, device=self.device) < self.dropout
        x, t, v = self.noised(latents, generator)
        return x, t, torch.where(dropped[:, None], self.empty, tokens), v, *more
