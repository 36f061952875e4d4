"""Teach the text encoder what words look like before it meets the U-Net: captions and pictures, contrasted.

Every end-of-text token is held to the picture, not only the first: padding repeats that token, so the U-Net then finds
the whole caption at each padded position instead of noise. Resumes from WORK/text.pt.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import Log, arguments, load, need, set_up_torch
from encode import THUMB
from models import build_text, read_text
from optim import Optimiser, learning_rate, precision
from state import State
from torch import Tensor, nn


class Matcher(nn.Module):
    """A picture tower for the contrast, and a head that paints a caption's thumbnail; both are thrown away."""

    def __init__(self, width: int):
        super().__init__()
        self.pictures = nn.Sequential(
            nn.Conv2d(3, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 96, 3, 2, 1), nn.GELU(),
            nn.Conv2d(96, 128, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(128 * (THUMB // 4) ** 2, width),
        )  # fmt: skip
        self.painter = nn.Linear(width, 3 * THUMB * THUMB)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, words: Tensor, thumbs: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled captions (B, W) and thumbnails (B, 3, 16, 16) -> loss and the share of captions that find theirs."""
        text, picture = F.normalize(words, dim=-1), F.normalize(self.pictures(thumbs), dim=-1)
        scores = self.logit_scale.exp() * text @ picture.T
        target = torch.arange(len(scores), device=scores.device)
        contrast = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        painted = (self.painter(words) - thumbs.flatten(1)).square().mean()
        return contrast + 2 * painted, (scores.argmax(1) == target).float().mean()


def pooled(states: Tensor, tokens: Tensor, end: int) -> Tensor:
    """Mean over the end-of-text token and the padding after it: (B, T, W) -> (B, W)."""
    mask = (tokens == end).unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def train(row: SimpleNamespace, work: Path, log: Log, bank: dict[str, Tensor]) -> None:
    """Train for the budget's steps or seconds."""
    device = set_up_torch(row.seed, row.threads)
    end = json.loads((work / "captions.json").read_text())["vocabulary"] - 1
    tokens, thumbs = bank["tokens"].to(device), bank["thumbs"].to(device)
    model, matcher = build_text(row, end + 1).to(device), Matcher(row.text_width).to(device)
    both = nn.ModuleDict({"text": model, "matcher": matcher})
    budget = {"steps": row.text_steps, "seconds": row.text_seconds}
    state, batch = State(work / "text.pt", both, Optimiser(both, row.muon), 0.99, **budget), row.text_batch
    dtype = precision(device) if device.type == "cuda" else None
    while state.goes_on():
        generator = torch.Generator(device).manual_seed(row.seed * 1_000_003 + state.step)
        rows = torch.randint(len(tokens), (batch,), generator=generator, device=device)
        variant = torch.randint(tokens.shape[1], (batch,), generator=generator, device=device)
        chosen, seen = tokens[rows, variant].long(), thumbs[rows].float() / 127.5 - 1
        seen = seen + 0.1 * torch.randn(seen.shape, generator=generator, device=device)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            states = read_text(model, chosen)
        loss, hit = matcher(pooled(states.float(), chosen, end), seen)
        state.update(loss, learning_rate(row.text_lr, state.done, 0.05, 0.4))
        if state.step % (4 * row.log_every) == 0:
            share = f"{float(hit):.1%} of captions find their picture"
            log(f"text: loss {float(loss.detach()):.3f}, {share}, {state.speed(batch)}")
    state.keep()


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "text.log"), load(need(work / "bank.pt", "encode.py")))


if __name__ == "__main__":
    main()
