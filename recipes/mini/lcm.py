"""Distil a few-step form: a LoRA with which the U-Net leaps to the picture in 1 to 4 steps. Resumes from WORK/lcm.pt.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; as LoRA 2311.05556): two neighbouring points of the
guided teacher's path must lead to the same picture. Needs WORK/train.pt.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from common import Log, arguments, load, need, set_up_torch
from diffusion import STEPS, decode
from lora import add_lora, write_kohya
from models import build_vae, read_text, read_unet
from optim import Optimiser, learning_rate, precision
from sheets import sheet, to_pixels
from state import State
from torch import Tensor, nn
from train import Data, prompts, tokens_of, trained_pair

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

    def __init__(self, data: Data, teacher: nn.Module, student: nn.Module, text: nn.Module):
        super().__init__()
        self.data, self.teacher, self.student, self.text = data, teacher, student, text
        self.a, self.s = data.schedule.a, data.schedule.s

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


def loss_of(course: Course, target: nn.Module, step: int, batch: int) -> Tensor:
    data, device = course.data, course.a.device
    generator = torch.Generator(device).manual_seed(4_000_037 + step)
    rows = torch.randint(len(data.latents), (batch,), generator=generator, device=device)
    variant = torch.randint(data.tokens.shape[1], (batch,), generator=generator, device=device)
    x0, tokens = data.latents[rows].float(), data.tokens[rows, variant].long()
    spot = torch.randint(1, GRID + 1, (batch,), generator=generator, device=device)
    t, before = spot * (STEPS // GRID) - 1, ((spot - 1) * (STEPS // GRID) - 1).clamp_min(0)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    x, _ = data.schedule.noised(x0, t, noise, t == STEPS - 1)
    w = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch, 1, 1, 1, generator=generator, device=device)
    with torch.no_grad():
        words, empty = read_text(course.text, tokens), read_text(course.text, data.empty.expand_as(tokens))
        wanted = course.leap(target, course.step_back(x, t, before, words, empty, w), before, words)
    error = (course.leap(course.student, x, t, words) - wanted).square()
    return ((error + 1e-4).sqrt() - 1e-2).mean()


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


def train(row: SimpleNamespace, work: Path, log: Log, bank: dict[str, Tensor]) -> None:
    """Distil for the budget's steps or seconds; a sheet in four steps at the end."""
    device = set_up_torch(row.seed, row.threads)
    pair = trained_pair(row, work, device).eval()
    data, student = Data(row, work, bank, device), copy.deepcopy(pair.unet)
    target = copy.deepcopy(pair.unet)
    lora, slow = add_lora(student, row.lora_rank), add_lora(target, row.lora_rank)
    slow.load_state_dict(lora.state_dict())
    course = Course(data, pair.unet, student, pair.text)
    budget = {"steps": row.lcm_steps, "seconds": row.lcm_seconds}
    state = State(work / "lcm.pt", lora, Optimiser(lora, False, weight_decay=0.0), 0.995, **budget)
    slow.load_state_dict(state.average.weights)
    dtype = precision(device)
    log(f"lcm: {sum(p.numel() for p in lora.parameters()) / 1e6:.2f} M parameters, {state.speed(row.lcm_batch)}")
    while state.goes_on():
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            loss = loss_of(course, target, state.step, row.lcm_batch)
        state.update(loss, learning_rate(row.lcm_lr, state.done, 0.03, 0.4))
        with torch.no_grad():
            torch._foreach_lerp_(list(slow.parameters()), list(lora.parameters()), 0.05)
        if state.step % row.log_every == 0:
            log(f"lcm: loss {float(loss.detach()):.4f}, {state.speed(row.lcm_batch)}")
    state.keep()
    lora.load_state_dict(state.average.weights)
    vae = build_vae(row).to(device).eval()
    vae.load_state_dict(load(work / "vae_final.pt")["model"])
    tokens = torch.from_numpy(tokens_of(work, prompts(row))).long().to(device)
    latents = torch.cat([draw(course, student, part, 4, 11) for part in tokens.split(32)])
    sheet(work / "sheets" / "lcm.png", to_pixels(decode(vae, latents)), 8)
    write_kohya(work / "relatives" / "few-step.safetensors", state.average.weights, student)


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "lcm.log"), load(need(work / "bank.pt", "encode.py")))


if __name__ == "__main__":
    main()
