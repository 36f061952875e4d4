"""Train the U-Net and the text encoder together on latents and captions. Resumes from WORK/train.pt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from captions import tokens_of
from common import HERE, Log, arguments, load, need, set_up_torch
from diffusion import decode, draw_times, noised, sample
from models import build_text, build_unet, build_vae, read_text, read_unet
from optim import Optimiser, faster_precision, learning_rate
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


class Data:
    """Latents and caption tokens, resident on the device; batches are functions of the seed."""

    def __init__(self, row: SimpleNamespace, work: Path, device: torch.device):
        arrays = np.load(need(work / "tokens.npz", "captions.py"))
        self.tokens = torch.from_numpy(arrays["tokens"]).to(device)
        self.latents = load(need(work / "latents.pt", "encode.py"))["latents"].to(device)
        self.empty = torch.from_numpy(tokens_of(work, [""])).long().to(device)
        weights = np.array([row.style_weights.get(row.names[s], 1.0) for s in arrays["style"]])
        self.weights = weights / weights.sum()
        self.row = row

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, times, tokens and targets of one step."""
        row = self.row
        rng = np.random.default_rng((row.seed, step))
        generator = torch.Generator().manual_seed(row.seed * 1_000_003 + step)
        rows = rng.choice(len(self.latents), row.batch, p=self.weights)
        tokens = self.tokens[rows, rng.integers(0, self.tokens.shape[1], row.batch)].long()
        tokens[torch.from_numpy(rng.random(row.batch) < row.caption_dropout)] = self.empty[0]
        t = draw_times(row.batch, row.high_share, row.high_from, generator)
        pure = (t >= 970) & (torch.rand(row.batch, generator=generator) < 0.5)
        x0 = self.latents[rows]
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x, v = noised(x0, t, noise, pure)
        return x, t.to(x0.device), tokens, v


@torch.no_grad()
def caption_gain(pair: Pair, data: Data) -> str:
    """Errors of v on fixed trained pictures with the right, a wrong and no caption at three noise levels."""
    rows = np.random.default_rng(1).choice(len(data.latents), min(96, len(data.latents)), replace=False)
    x0, right = data.latents[rows], data.tokens[rows, 0].long()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(x0.device)
    parts = []
    for level in (950, 700, 400):
        t = torch.full((len(rows),), level)
        x, v = noised(x0, t, noise, torch.zeros(len(rows), dtype=torch.bool))
        texts = (right, right.roll(1, 0), data.empty.expand_as(right))
        errors = [float((pair(x, t.to(x.device), tokens) - v).square().mean()) for tokens in texts]
        parts.append(f"t{level} " + "/".join(f"{error:.3f}" for error in errors))
    return ", ".join(parts)


def make_sheet(pair: Pair, work: Path, row: SimpleNamespace, data: Data, path: Path) -> None:
    """The prompts of prompts.txt from fixed noise."""
    prompts = (HERE / "prompts.txt").read_text().splitlines()[: row.sheet_prompts]
    vae = build_vae(row).to(data.latents.device).eval()
    vae.load_state_dict(load(work / "vae_final.pt")["model"])
    tokens = torch.from_numpy(tokens_of(work, prompts)).long().to(data.latents.device)
    latents = [sample(pair.unet, pair.text, part, data.empty, 11) for part in tokens.split(32)]
    sheet(path, to_pixels(decode(vae, torch.cat(latents))), 8, zoom=2 if row.size <= 64 else 1)


class Run:
    """The networks, their data and their state."""

    def __init__(self, row: SimpleNamespace, work: Path, device: torch.device):
        self.row, self.work, self.device = row, work, device
        facts = json.loads(need(work / "captions.json", "captions.py").read_text())
        row.names = facts["styles"]
        text, unet = build_text(row, facts["vocabulary"]), build_unet(row)
        if (work / "text.pt").exists():
            text.load_state_dict(averaged(work / "text.pt", "text."))
        nn.init.zeros_(unet.conv_out.weight)
        self.pair = Pair(text, unet).to(device)
        self.twin = Pair(build_text(row, facts["vocabulary"]), build_unet(row)).to(device).eval()
        self.data = Data(row, work, device)
        self.state = State(work / "train.pt", self.pair, Optimiser(self.pair, row.muon), row.average)

    def measured_precision(self) -> torch.dtype | None:
        """What to autocast to on this machine, or None for float32."""
        x, t, tokens, v = (part[: 256 if self.device.type == "cuda" else 16] for part in self.data.batch(0))

        def step() -> None:
            (self.pair(x, t, tokens).float() - v).square().mean().backward()
            self.pair.zero_grad(set_to_none=True)

        return faster_precision(self.device, step)

    def look(self, log: Log) -> None:
        """Sheet and caption gain of the averaged weights."""
        self.twin.load_state_dict(self.state.average.weights)
        log(f"train: right/wrong/no caption {caption_gain(self.twin, self.data)}")
        folder = self.work / "sheets"
        folder.mkdir(exist_ok=True)
        make_sheet(self.twin, self.work, self.row, self.data, folder / f"{self.state.step:06d}.png")


def train(run: Run, log: Log, minutes: float) -> None:
    """Train until `row.samples` were seen, with a sheet every `row.sheet_minutes`."""
    row, state, device = run.row, run.state, run.device
    dtype, total = run.measured_precision(), max(row.samples // row.batch, 1)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (run.pair.unet, run.pair.text)]
    log(f"train: U-Net {millions[0]:.2f} M, text {millions[1]:.2f} M, {dtype or 'float32'}, step {state.step}/{total}")
    drawn, losses = state.began, []
    while state.goes_on(total, minutes):
        x, t, tokens, v = run.data.batch(state.step)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            made = run.pair(x, t, tokens)
        loss = (made.float() - v).square().mean()
        losses.append(state.update(loss, learning_rate(row.lr, state.step / total, 0.005, row.cooldown)))
        if state.step % row.log_every == 0 or state.step == total:
            log(f"train: {state.step}/{total} loss {np.mean(losses):.4f}, {state.speed(row.batch)}")
            losses.clear()
        if state.clock.tick() - drawn > 60 * row.sheet_minutes:
            run.look(log)
            drawn = state.clock.tick()
    state.keep()
    run.look(log)


def main() -> None:
    options = {"--minutes": {"type": float, "default": 0.0, "help": "stop (resumable) after so many minutes"}}
    args, row, work = arguments(__doc__, options)
    train(Run(row, work, set_up_torch(row.seed, row.threads)), Log(work / "train.log"), args.minutes)


if __name__ == "__main__":
    main()
