"""A judge of the pictures, trained apart from the painter: what is there, how many, on which colour? WORK/judge.pt."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import Log, arguments, need, seconds_of, set_up_torch
from compose import Sprites, sketched
from optim import Optimiser, learning_rate, precision
from scenes import THINGS
from state import State, averaged
from torch import Tensor, nn
from train_vae import scene_rows

SIDE = 64  # pixels the judge looks at: fewer than there are, so that it does not read single pixels
WIDTHS = (32, 64, 128, 256)
SKETCHES = 0.12  # share of the pictures that it sees as pencil sketches, its last style


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
    """Pictures (B, 3, H, W) in -1..1 -> scores of concepts, of 0 to 3 things, of plain colours, of styles and sketches.

    Concepts are looked for in every place of an 8 x 8 grid; the best places count.
    """

    def __init__(self, concepts: int, colours: int, styles: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(WIDTHS)))
        self.norm = nn.GroupNorm(8, WIDTHS[-1])
        self.mix = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 5, padding=2)
        self.concepts = nn.Conv2d(WIDTHS[-1], concepts, 1)
        self.others = nn.ModuleList(nn.Linear(WIDTHS[-1], count) for count in (THINGS + 1, colours, styles + 1))

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, 8, 8)."""
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        h = F.gelu(self.norm(self.blocks(self.conv_in(x))))
        return F.gelu(h + self.mix(h))

    def where(self, x: Tensor, concept: Tensor) -> Tensor:
        """Column and row (B, 2) in 0..7 around which a concept (B,) of each picture is seen."""
        scores = self.concepts(self.features(x))
        chosen = scores[torch.arange(len(x)), concept].flatten(1).float().softmax(1).view(len(x), 8, 8)
        line = torch.arange(8, device=x.device).float()
        return torch.stack([(chosen.sum(1) * line).sum(1), (chosen.sum(2) * line).sum(1)], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four tables of scores (B, kinds)."""
        h = self.features(x)
        concepts = self.concepts(h).flatten(2).float()
        pooled = h.mean((2, 3))
        count, colour, style = (layer(pooled).float() for layer in self.others)
        return concepts.logsumexp(2) - math.log(concepts.shape[2]), count, colour, style


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """The blur, noise and drift of a small painter, so that the judge looks at shapes."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device)

    side = x.shape[-1]
    small = max(16, int(side * (0.35 + 0.65 * float(draw(1)))))
    x = F.interpolate(F.interpolate(x, size=small, mode="bilinear", antialias=True), size=side, mode="bilinear")
    x = x * (0.9 + 0.2 * draw(len(x), 1, 1, 1)) + 0.1 * (draw(len(x), 3, 1, 1) - 0.5)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return x + 0.15 * draw(len(x), 1, 1, 1) * noise


def loss_of(scores: tuple[Tensor, ...], found: Tensor) -> Tensor:
    """Cross entropy of every concept that is there, of their number, the colour (where there is one) and the style."""
    concepts, count, colour, style = scores
    wanted = found[:, :THINGS]
    there = (wanted >= 0).float()
    logs = concepts.log_softmax(1).gather(1, wanted.clamp_min(0))
    named = -(logs * there).sum() / there.sum().clamp_min(1)
    number = F.cross_entropy(count, there.sum(1).long())
    plain = F.cross_entropy(colour, found[:, THINGS].clamp_min(0), reduction="none")
    plain = (plain * (found[:, THINGS] >= 0)).mean()
    return named + 0.5 * number + 0.5 * plain + 0.2 * F.cross_entropy(style, found[:, THINGS + 1])


def sizes_of(work: Path) -> tuple[int, int, int]:
    from common import words

    facts = json.loads(need(work / "captions.json", "captions.py").read_text())
    return len(facts["concepts"]), len(words()["colours"]), len(facts["styles"])


def train(row: SimpleNamespace, work: Path, log: Log, sprites: Sprites | None = None) -> None:
    """Train on the judge's own scenes, which hold every pair, for the budget's pictures or seconds."""
    device = set_up_torch(row.seed + 1, row.threads)
    sprites = sprites or Sprites.of(work, device)
    rows, _, found = (torch.from_numpy(some).to(device) for some in scene_rows(work, judge=True))
    (concepts, colours, styles), batch = sizes_of(work), row.judge_batch
    judge = Judge(concepts, colours, styles).to(device)
    budget = {"steps": row.judge_images // batch, "seconds": seconds_of(row, row.judge_seconds)}
    state = State(work / "judge.pt", judge, Optimiser(judge, row.muon, weight_decay=0.1), 0.998, **budget)
    dtype = precision(device)
    while state.goes_on():
        generator = torch.Generator(device).manual_seed(row.seed * 1_000_003 + state.step)
        chosen = torch.randint(len(rows), (batch,), generator=generator, device=device)
        x, wanted, sketches = sprites.paint(rows[chosen]), found[chosen].long(), int(SKETCHES * batch)
        x[:sketches] = sketched(x[:sketches])
        wanted[:sketches, THINGS], wanted[:sketches, THINGS + 1] = -1, styles
        x = disturbed(x, generator)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            scores = judge(x)
        loss = loss_of(scores, wanted)
        state.update(loss, learning_rate(2e-3, state.done, 0.02, 0.5))
        if state.step % (2 * row.log_every) == 0:
            first = found[chosen, 0].long()
            hits = (scores[0].topk(5).indices == first[:, None]).any(1)[first >= 0].float().mean()
            log(f"judge: loss {float(loss.detach()):.3f}, first among five {float(hits):.1%}, {state.speed(batch)}")
    state.keep()


def load_judge(work: Path, device: torch.device) -> Judge:
    judge = Judge(*sizes_of(work)).to(device).eval()
    judge.load_state_dict(averaged(need(work / "judge.pt", "judge.py")))
    return judge


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor) -> tuple[Tensor, ...]:
    """The judge's four tables for pictures (B, 3, H, W), on the CPU."""
    device = next(judge.parameters()).device
    parts = [judge(part.to(device)) for part in pictures.split(64)]
    return tuple(torch.cat(some).cpu() for some in zip(*parts, strict=True))


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "judge.log"))


if __name__ == "__main__":
    main()
