"""Distil a few-step form: a LoRA with which the U-Net leaps to the picture in 1 to 4 steps. Resumes from WORK/lcm.pt.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; as LoRA 2311.05556): two neighbouring points of the
guided teacher's path must lead to the same picture. Needs WORK/train.pt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from bank import Bank
from captions import tokens_of
from common import Log, seconds_of, set_up_torch, trained
from diffusion import STEPS, Schedule, decode
from lora import add_lora, write_kohya
from models import read_text, read_unet
from optim import Optimiser, learning_rate, precision
from sheets import sheet, to_pixels
from state import State
from torch import Tensor, nn
from train import prompts, trained_pair

GRID = 50  # points of the teacher's path
GUIDANCE = (2.5, 4.5)  # drawn for each picture; the form itself then needs none
SIGMA, SCALE = 0.5, 10.0  # of the boundary condition, as in the LCM scheduler


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the noisy latents and of the prediction makes the answer: nothing but the latents at t = 0."""
    scaled = (SCALE * t.float()).view(-1, 1, 1, 1)
    skip = SIGMA**2 / (scaled.square() + SIGMA**2)
    return skip, scaled / (scaled.square() + SIGMA**2).sqrt()


class Course(nn.Module):
    """Teacher, student and the schedule between them."""

    def __init__(self, schedule: Schedule, empty: Tensor, teacher: nn.Module, student: nn.Module, text: nn.Module):
        super().__init__()
        self.schedule, self.empty = schedule, empty
        self.teacher, self.student, self.text = teacher, student, text
        self.a, self.s = schedule.a, schedule.s

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of picture and noise at these times."""
        return self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)

    def leap(self, unet: nn.Module, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """The picture's latents that a consistency model sees in noisy ones."""
        a, s = self.scales(t)
        skip, out = boundary(t)
        return skip * x + out * (a * x - s * read_unet(unet, x, t, words).float())

    @torch.no_grad()
    def step_back(self, x: Tensor, t: Tensor, before: Tensor, words: Tensor, empty: Tensor, w: Tensor) -> Tensor:
        """One guided DDIM step of the teacher from t to an earlier time."""
        both = read_unet(self.teacher, torch.cat([x, x]), torch.cat([t, t]), torch.cat([words, empty]))
        right, none = both.float().chunk(2)
        v = none + w * (right - none)
        a, s = self.scales(t)
        x0, noise = a * x - s * v, s * x + a * v
        a, s = self.scales(before)
        return a * x0 + s * noise


def inputs_of(bank: Bank, step: int, count: int) -> tuple[Tensor, ...]:
    """Noisy latents, their times and earlier ones, tokens and the guidance of one step."""
    generator, (x0, tokens) = bank.captioned(step, count)
    spot = torch.randint(1, GRID + 1, (count,), generator=generator, device=bank.device)
    t, before = spot * (STEPS // GRID) - 1, ((spot - 1) * (STEPS // GRID) - 1).clamp_min(0)
    noise = torch.randn(x0.shape, generator=generator, device=bank.device)
    x, _ = bank.schedule.noised(x0, t, noise, t == STEPS - 1)
    w = torch.rand(count, 1, 1, 1, generator=generator, device=bank.device)
    return x, t, before, tokens, GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * w


def step_of(course: Course, target: nn.Module, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """The distance between the student's picture and the target's of a point that is one step further."""

    def step(x: Tensor, t: Tensor, before: Tensor, tokens: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            with torch.no_grad():
                words, empty = (read_text(course.text, some) for some in (tokens, course.empty.expand_as(tokens)))
                wanted = course.leap(target, course.step_back(x, t, before, words, empty, w), before, words)
            error = (course.leap(course.student, x, t, words) - wanted).square()
        return ((error + 1e-4).sqrt() - 1e-2).mean()

    return step


@torch.no_grad()
def draw(course: Course, unet: nn.Module, tokens: Tensor, steps: int, seed: int) -> Tensor:
    """Latents in so many leaps, noised again between them."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    shape = (len(tokens), config.in_channels, config.sample_size, config.sample_size)
    words = read_text(course.text, tokens)
    x = torch.randn(shape, generator=generator).to(tokens.device)
    for k in range(steps, 0, -1):
        t = torch.full((len(x),), STEPS * k // steps - 1, device=x.device)
        x0 = course.leap(unet, x, t, words)
        if k == 1:
            break
        a, s = course.scales(torch.full_like(t, STEPS * (k - 1) // steps - 1))
        x = a * x0 + s * torch.randn(shape, generator=generator).to(x.device)
    return x0


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Distil for the budget's steps or seconds; a sheet in four steps at the end."""
    device, batch = set_up_torch(row.seed, row.threads), row.lcm_batch
    pair, bank = trained_pair(row, work, device).eval(), Bank(row, work, device)
    student, target = copy.deepcopy(pair.unet), copy.deepcopy(pair.unet)
    lora, slow = add_lora(student, row.lora_rank), add_lora(target, row.lora_rank)
    course = Course(bank.schedule, bank.empty, pair.unet, student, pair.text)
    step = step_of(course, target, precision(device))
    slow.load_state_dict(lora.state_dict())
    budget = {"steps": row.lcm_steps, "seconds": seconds_of(row, row.lcm_seconds)}
    state = State(work / "lcm.pt", lora, Optimiser(lora, False, weight_decay=0.0), 0.995, **budget)
    slow.load_state_dict(state.average.weights)
    log(f"lcm: {sum(p.numel() for p in lora.parameters()) / 1e6:.2f} M parameters, {state.speed(batch)}")

    def loss_at(at: int) -> Tensor:
        with torch.no_grad():
            torch._foreach_lerp_(list(slow.parameters()), list(lora.parameters()), 0.05)
        return step(*inputs_of(bank, at, batch))

    rate_at = partial(learning_rate, row.lcm_lr, warmup=0.03, cooldown=0.4)
    state.run("lcm", loss_at, rate_at, log, every=row.log_every, batch=batch, minutes=minutes)
    write_kohya(work / "relatives" / "few-step.safetensors", state.average.weights, student)
    lora.load_state_dict(state.average.weights)
    tokens = torch.from_numpy(tokens_of(work, prompts(row))).long().to(device)
    latents = torch.cat([draw(course, student, part, 4, 11) for part in tokens.split(32)])
    sheet(work / "sheets" / "few-step.png", to_pixels(decode(bank.vae, latents)), 8)


if __name__ == "__main__":
    trained(__doc__, "lcm", train)
