"""Teach the text encoder what words look like before it meets the U-Net: captions and pictures, contrasted.

Every end-of-text token is held to the picture, not only the first: padding repeats that token, so the U-Net then finds
the whole caption at each padded position instead of noise. Resumes from WORK/text.pt.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, arguments, need, set_up_torch
from models import build_text, read_text
from optim import Optimiser, learning_rate
from sheets import to_tensor
from state import State
from torch import Tensor, nn

THUMB = 16  # pixels of the pictures that captions are compared with


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


def thumbnails(work: Path, pictures: np.ndarray) -> Tensor:
    images = to_tensor(np.load(work / "art.npz")["images"][pictures])
    return F.adaptive_avg_pool2d(images, THUMB)


def train(row: SimpleNamespace, work: Path, log: Log) -> None:
    """Train for `row.text_steps` batches of distinct pairs."""
    device = set_up_torch(row.seed, row.threads)
    data = np.load(need(work / "tokens.npz", "captions.py"))
    end = json.loads((work / "captions.json").read_text())["vocabulary"] - 1
    tokens, thumbs = torch.from_numpy(data["tokens"]), thumbnails(work, data["picture"])
    model, matcher = build_text(row, end + 1).to(device), Matcher(row.text_width).to(device)
    both = nn.ModuleDict({"text": model, "matcher": matcher})
    state, hits = State(work / "text.pt", both, Optimiser(both, row.muon), 0.99), []
    while state.goes_on(row.text_steps):
        rng = np.random.default_rng((row.seed, state.step))
        rows = rng.permutation(len(tokens))[: row.text_batch]
        chosen = tokens[rows, rng.integers(0, tokens.shape[1], len(rows))].long().to(device)
        seen = thumbs[rows].to(device)
        seen = seen + 0.1 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(state.step)).to(device)
        loss, hit = matcher(pooled(read_text(model, chosen), chosen, end), seen)
        rate = learning_rate(row.text_lr, state.step / row.text_steps, 0.05, 0.4)
        hits.append((state.update(loss, rate), float(hit)))
        if state.step % 50 == 0 or state.step == row.text_steps:
            error, share = np.mean(hits, 0)
            log(f"text: {state.step}/{row.text_steps} loss {error:.3f}, {share:.1%} of captions find their picture")
            hits.clear()
    state.keep()


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "text.log"))


if __name__ == "__main__":
    main()
