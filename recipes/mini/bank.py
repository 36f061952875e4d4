"""Scenes thought up, painted and encoded as they are needed: for the relatives, which need few."""

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


class Bank:
    """Batches of noisy latents with their captions, as functions of the seed and the step.

    `change` is done to the pictures.
    """

    def __init__(self, row: SimpleNamespace, work: Path, device: torch.device):
        self.row, self.device = row, device
        self.writer, self.sprites = Writer(row, work), Sprites.of(work, device)
        self.vae = build_vae(row).to(device, memory_format=torch.channels_last).eval()
        self.vae.load_state_dict(load(need(work / "vae_final.pt", "encode.py"))["model"])
        self.empty = torch.from_numpy(tokens_of(work, [""])).long().to(device)
        self.schedule = Schedule(device)
        self.change: Callable[[Tensor], Tensor] = lambda x: x
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def pictures(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and tokens (B, T), a share of them those of no caption."""
        rng, rows, ids = random.Random(9_000_000 + step), [], []
        while len(rows) < count:
            numbers, texts, _ = scene(self.writer.books[False], rng)
            spelled = self.writer.tokens(rng.choice(texts))
            if spelled is not None:
                rows.append(numbers)
                ids.append(spelled)
        tokens = torch.tensor(ids, device=self.device)
        dropped = torch.tensor([rng.random() < self.row.caption_dropout for _ in rows], device=self.device)
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        return self.change(self.sprites.paint(torch.tensor(rows, device=self.device))), tokens

    def latents(self, x: Tensor) -> Tensor:
        """Unit-scale latents of pictures."""
        return encode(self.vae, x) * SCALING_FACTOR

    def noised(self, x0: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, times and targets."""
        generator = torch.Generator(self.device).manual_seed(self.row.seed * 1_000_003 + step)
        t = draw_times(len(x0), self.row.high_share, self.row.high_from, generator)
        pure = (t >= 970) & (torch.rand(len(x0), generator=generator, device=self.device) < 0.5)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        x, v = self.schedule.noised(x0, t, noise, pure)
        return x.contiguous(memory_format=torch.channels_last), t, v

    def noisy(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, times, tokens and targets of one step; where `painted` is set, of so many batches in turn."""
        place = step % self.row.painted if self.row.painted else step
        if place in self.kept:
            latents, tokens = self.kept[place]
        else:
            pictures, tokens = self.pictures(place, count)
            latents = self.latents(pictures)
            if self.row.painted:
                self.kept[place] = latents, tokens
        x, t, v = self.noised(latents, step)
        return x, t, tokens, v
