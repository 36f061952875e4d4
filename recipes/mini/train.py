"""Train the U-Net and the text encoder together on latents and captions. Resumes from WORK/train.pt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from captions import tokens_of
from common import HERE, MINUTES, Log, arguments, load, need, set_up_torch
from diffusion import Schedule, decode, draw_times, sample
from faster import Faster
from models import build_text, build_unet, build_vae, read_text, read_unet
from optim import Optimiser, learning_rate, precision
from sheets import sheet, to_pixels
from state import State, averaged
from torch import Tensor, nn


class Pair(nn.Module):
    """Text encoder and U-Net, trained as one: noisy latents, times, tokens -> v."""

    def __init__(self, text: nn.Module, unet: nn.Module):
        super().__init__()
        self.text = text
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """(B, C, h, w), (B,), (B, T) -> (B, C, h, w)."""
        return read_unet(self.unet, x, t, read_text(self.text, tokens))


def vocabulary_of(work: Path) -> int:
    return json.loads(need(work / "captions.json", "captions.py").read_text())["vocabulary"]


def build_pair(row: SimpleNamespace, work: Path) -> Pair:
    pair = Pair(build_text(row, vocabulary_of(work)), build_unet(row))
    nn.init.zeros_(pair.unet.conv_out.weight)
    return pair


def trained_pair(row: SimpleNamespace, work: Path, device: torch.device) -> Pair:
    """The pair that this step has trained, averaged; it learns nothing more."""
    pair = build_pair(row, work).to(device, memory_format=torch.channels_last)
    pair.load_state_dict(averaged(need(work / "train.pt", "train.py")))
    return pair.requires_grad_(False)


def step_of(pair: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Mean squared error of v."""

    def step(x: Tensor, t: Tensor, tokens: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            made = pair(x, t, tokens)
        return (made.float() - v).square().mean()

    return step


class Data:
    """Latents and caption tokens, resident on the device; batches are functions of the seed."""

    def __init__(self, row: SimpleNamespace, work: Path, bank: dict[str, Tensor], device: torch.device):
        self.latents, self.tokens = bank["latents"].to(device), bank["tokens"].to(device)
        self.empty = torch.from_numpy(tokens_of(work, [""])).long().to(device)
        self.schedule, self.row, self.device = Schedule(device), row, device

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, times, tokens and targets of one step."""
        row, device = self.row, self.device
        generator = torch.Generator(device).manual_seed(row.seed * 1_000_003 + step)

        def draw(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=device)

        rows = draw(len(self.latents))
        tokens = self.tokens[rows, draw(self.tokens.shape[1])].long()
        dropped = torch.rand(count, generator=generator, device=device) < row.caption_dropout
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        t = draw_times(count, row.high_share, row.high_from, generator)
        pure = (t >= 970) & (torch.rand(count, generator=generator, device=device) < 0.5)
        x0 = self.latents[rows].float()
        noise = torch.randn(x0.shape, generator=generator, device=device)
        x, v = self.schedule.noised(x0, t, noise, pure)
        return x.contiguous(memory_format=torch.channels_last), t, tokens, v


def example(row: SimpleNamespace, work: Path, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor], tuple]:
    """Networks, their step and inputs of the shapes that training has."""
    pair = build_pair(row, work).to(device, memory_format=torch.channels_last)
    side = pair.unet.config.sample_size
    bank = {
        "latents": torch.randn(4, row.latent_channels, side, side).half(),
        "tokens": torch.zeros(4, 3, row.tokens, dtype=torch.int16),
    }
    return pair, step_of(pair, precision(device)), Data(row, work, bank, device).batch(0, row.batch)


@torch.no_grad()
def caption_gain(pair: Pair, data: Data) -> str:
    """Errors of v on fixed trained pictures with the right, a wrong and no caption at three noise levels."""
    x0 = data.latents[: min(192, len(data.latents))].float()
    right = data.tokens[: len(x0), 0].long()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(x0.device)
    parts = []
    for level in (950, 700, 400):
        t = torch.full((len(x0),), level, device=x0.device)
        x, v = data.schedule.noised(x0, t, noise, t < 0)
        texts = (right, right.roll(1, 0), data.empty.expand_as(right))
        errors = [float((pair(x, t, tokens) - v).square().mean()) for tokens in texts]
        parts.append(f"t{level} " + "/".join(f"{error:.3f}" for error in errors))
    return ", ".join(parts)


def prompts(row: SimpleNamespace) -> list[str]:
    return (HERE / "prompts.txt").read_text().splitlines()[: row.sheet_prompts]


def make_sheet(pair: Pair, work: Path, row: SimpleNamespace, empty: Tensor, path: Path) -> None:
    """The prompts of prompts.txt from fixed noise."""
    vae = build_vae(row).to(empty.device).eval()
    vae.load_state_dict(load(work / "vae_final.pt")["model"])
    tokens = torch.from_numpy(tokens_of(work, prompts(row))).long().to(empty.device)
    latents = [sample(pair.unet, pair.text, part, empty, 11) for part in tokens.split(32)]
    sheet(path, to_pixels(decode(vae, torch.cat(latents))), 8)


def look(twin: Pair, state: State, data: Data, row: SimpleNamespace, work: Path, log: Log) -> None:
    """Sheet and caption gain of the averaged weights."""
    twin.load_state_dict(state.average.weights)
    log(f"train: right/wrong/no caption {caption_gain(twin, data)}")
    make_sheet(twin, work, row, data.empty, work / "sheets" / f"{state.step:06d}.png")


def train(row: SimpleNamespace, work: Path, log: Log, bank: dict[str, Tensor], minutes: float = 0.0) -> None:
    """Train for the budget's samples or seconds, with a sheet every `row.sheet_minutes`."""
    device = set_up_torch(row.seed, row.threads)
    pair = build_pair(row, work)
    if (work / "text.pt").exists() and not (work / "train.pt").exists():
        pair.text.load_state_dict(averaged(work / "text.pt", "text."))
    pair.to(device, memory_format=torch.channels_last)
    twin, data = build_pair(row, work).to(device).eval(), Data(row, work, bank, device)
    budget = {"steps": row.samples // row.batch, "seconds": row.seconds}
    state, batch = State(work / "train.pt", pair, Optimiser(pair, row.muon), row.average, **budget), row.batch
    faster = Faster("train", pair, step_of(pair, precision(device)), work, log)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (pair.unet, pair.text)]
    log(f"train: U-Net {millions[0]:.2f} M, text {millions[1]:.2f} M, {len(data.latents)} scenes, {state.speed(batch)}")
    drawn, total = state.began, torch.zeros((), device=device)
    while state.goes_on(minutes):
        inputs = data.batch(state.step, batch)
        try:
            loss = faster(*inputs)
            state.update(loss, learning_rate(row.lr, state.done, 0.01, row.cooldown))
        except torch.cuda.OutOfMemoryError:
            batch = max(batch // 2, 1)
            faster.give_up()
            log(f"train: out of memory, batch {batch} from here")
            continue
        total += loss.detach()
        if state.step % row.log_every == 0:
            faster.look(*inputs)
            if not math.isfinite(value := float(total) / row.log_every):
                state.fall_back()
            log(f"train: loss {value:.4f}, {state.speed(batch)}")
            total.zero_()
        if state.clock.tick() - drawn > 60 * row.sheet_minutes:
            look(twin, state, data, row, work, log)
            drawn = state.clock.tick()
    state.keep()
    look(twin, state, data, row, work, log)


def main() -> None:
    args, row, work = arguments(__doc__, MINUTES)
    train(row, work, Log(work / "train.log"), load(need(work / "bank.pt", "encode.py")), args.minutes)


if __name__ == "__main__":
    main()
