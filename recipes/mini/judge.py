"""A judge of the pictures, trained apart from the painter on the same art: which emoji is this? WORK/judge.pt."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, arguments, need, set_up_torch
from optim import Optimiser, learning_rate
from sheets import to_tensor
from state import State, averaged
from torch import Tensor, nn

SIDE = 48  # pixels the judge looks at: 64 less a little, so that it does not read single pixels


class Block(nn.Module):
    """Two convolutions around a shortcut, the first halving the picture."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, 2, 1)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1)
        self.short = nn.Conv2d(inside, outside, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        h = self.second(F.gelu(self.norm2(self.first(F.gelu(self.norm1(x))))))
        return h + self.short(F.avg_pool2d(x, 2))


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 -> scores (B, emoji)."""

    def __init__(self, emoji: int, widths: tuple[int, ...] = (24, 64, 128, 192)):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.head = nn.Linear(widths[-1] * (SIDE // 8 // 2) ** 2, emoji)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every emoji."""
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        h = self.conv_out(F.gelu(self.norm(self.blocks(self.conv_in(x)))))
        return self.head(F.avg_pool2d(F.gelu(h), 2).flatten(1))


def disturbed(x: Tensor, rng: np.random.Generator) -> Tensor:
    """The blur, shift, noise and colour drift of a small painter, so that the judge looks at shapes."""
    shift = tuple(int(n) for n in rng.integers(-x.shape[-1] // 16, x.shape[-1] // 16 + 1, 2))
    x = torch.roll(x, shift, (2, 3))
    if rng.random() < 0.5:
        small = F.interpolate(x, scale_factor=float(rng.uniform(0.3, 0.8)), mode="bilinear", antialias=True)
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    count = len(x)
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (count, 3, 1, 1))).float().to(x.device)
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
    x = 1 - (1 - x) * gain + float(rng.uniform(0, 0.15)) * noise
    mirror = torch.from_numpy(rng.random(count) < 0.3).to(x.device)
    return torch.where(mirror.view(-1, 1, 1, 1), x.flip(3), x)


def train(row: SimpleNamespace, work: Path, log: Log) -> None:
    """Train on every picture there is until `row.judge_images` were seen."""
    device = set_up_torch(row.seed + 1, row.threads)
    art = np.load(need(work / "art.npz", "render.py"))
    images, emoji = art["images"], torch.from_numpy(art["emoji"]).long()
    count = len(json.loads((work / "art.json").read_text())["emoji"])
    judge = Judge(count).to(device)
    optimiser = Optimiser(judge, row.muon, weight_decay=0.1)
    state, total, hits = State(work / "judge.pt", judge, optimiser, 0.998), max(row.judge_images // 64, 1), []
    while state.goes_on(total):
        rng = np.random.default_rng((row.seed + 1, state.step))
        rows = rng.integers(0, len(images), 64)
        scores = judge(disturbed(to_tensor(images[rows]).to(device), rng))
        target = emoji[rows].to(device)
        hits.append(float((scores.topk(min(5, count)).indices == target[:, None]).any(1).float().mean()))
        loss = F.cross_entropy(scores, target, label_smoothing=0.1)
        state.update(loss, learning_rate(2e-3, state.step / total, 0.02, 0.5))
        if state.step % 200 == 0 or state.step == total:
            share = f"right name among five {np.mean(hits):.1%} on disturbed art"
            log(f"judge: {state.step}/{total}, {share}, {state.speed(64)}")
            hits.clear()
    state.keep()


@torch.no_grad()
def ranks(work: Path, pictures: Tensor, emoji: Tensor) -> Tensor:
    """For pictures (B, 3, H, W) the place of the right emoji among all, 0 the best."""
    state = averaged(need(work / "judge.pt", "judge.py"))
    judge = Judge(len(state["head.bias"]))
    judge.load_state_dict(state)
    scores = torch.cat([judge(part) for part in pictures.cpu().split(64)])
    return (scores > scores.gather(1, emoji[:, None].cpu())).sum(1)


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "judge.log"))


if __name__ == "__main__":
    main()
