"""Paint scenes on the device: rows of numbers (scenes.py) and the art become pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import pictures_of
from scenes import CHECKS, DOTS, FADING, STRIPES, THING, THINGS
from torch import Tensor

PAPER, PENCIL = (0.97, 0.95, 0.9), (0.2, 0.2, 0.24)
SHRINK = (1.0, 0.75, 0.5, 0.375, 0.28125)  # sides at which the art is kept, so that small things are not jagged


class Sprites:
    """The art on a device at several sizes, premultiplied: per size (N, 4, h, w) uint8."""

    def __init__(self, pictures: list[np.ndarray] | np.ndarray, device: torch.device):
        self.device = device
        self.side = pictures[0].shape[0]
        sides = [round(self.side * share) for share in SHRINK]
        self.levels = [torch.empty(len(pictures), 4, side, side, dtype=torch.uint8, device=device) for side in sides]
        for start in range(0, len(pictures), 512):
            whole = torch.from_numpy(np.stack(pictures[start : start + 512])).to(device).permute(0, 3, 1, 2).float()
            whole[:, :3] *= whole[:, 3:] / 255
            for level, side in zip(self.levels, sides, strict=True):
                small = F.interpolate(whole, size=side, mode="bilinear", antialias=True) if side < self.side else whole
                level[start : start + 512] = small.round().clamp(0, 255).byte()
        self.sides = sides

    @classmethod
    def of(cls, work: Path, device: torch.device) -> Sprites:
        """All art of a work folder."""
        return cls(pictures_of(work)[0], device)

    def layer(self, things: Tensor) -> Tensor:
        """Rows (N, THING) of drawn things -> premultiplied layers (N, 4, H, W) in 0..1."""
        made = torch.zeros(len(things), 4, self.side, self.side, device=self.device)
        needed = (things[:, 3] * 0.95).clamp(max=1)
        shares = torch.tensor(SHRINK, device=self.device)
        level_of = (shares[None] >= needed[:, None]).sum(1) - 1
        for number, level in enumerate(self.levels):
            rows = (level_of == number).nonzero()[:, 0]
            if len(rows):
                some = things[rows]
                art = level[some[:, 0].long()].float() / 255
                made[rows] = placed(shaded(turned(art, some[:, 6]), some[:, 7]), some, self.side)
        return made

    def paint(self, rows: Tensor) -> Tensor:
        """Scenes (B, COLUMNS) on the device -> pictures (B, 3, H, W) in -1..1."""
        canvas = background(rows[:, THINGS * THING :], self.side)
        for k in range(THINGS):
            things = rows[:, k * THING : (k + 1) * THING]
            present = (things[:, 0] >= 0).nonzero()[:, 0]
            if len(present):
                layer = self.layer(things[present])
                canvas[present] = layer[:, :3] + canvas[present] * (1 - layer[:, 3:])
        return canvas.clamp_(0, 1) * 2 - 1


def turned(art: Tensor, turn: Tensor) -> Tensor:
    """Premultiplied (N, 4, h, w) with hues turned by `turn` (N,) turns, where that is not 0."""
    rows = (turn != 0).nonzero()[:, 0]
    if not len(rows):
        return art
    rgb = art[rows, :3]
    high, low = rgb.amax(1), rgb.amin(1)
    range_ = (high - low).clamp_min(1e-5)
    r, g, b = rgb.unbind(1)
    sixth = torch.where(high == r, (g - b) / range_, torch.where(high == g, (b - r) / range_ + 2, (r - g) / range_ + 4))
    hue = (sixth + 6 * turn[rows, None, None]) % 6
    parts = [high - (high - low) * torch.minimum(k, 4 - k).clamp(0, 1) for k in ((hue + n) % 6 for n in (5, 3, 1))]
    art = art.clone()
    art[rows, :3] = torch.stack(parts, 1)
    return art


def shaded(art: Tensor, shade: Tensor) -> Tensor:
    """Premultiplied art made lighter or darker."""
    colour = torch.minimum(art[:, :3] * shade.view(-1, 1, 1, 1), art[:, 3:])
    return torch.cat([colour, art[:, 3:]], 1)


def placed(art: Tensor, things: Tensor, side: int) -> Tensor:
    """Art (N, 4, h, w) moved, sized, turned and mirrored as the things say: (N, 4, side, side)."""
    x, y, size, angle, mirrored = (things[:, k] for k in range(1, 6))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    flip = 1 - 2 * mirrored
    dx, dy = 2 * x - 1, 2 * y - 1
    across = torch.stack([flip * cos, flip * sin, -flip * (cos * dx + sin * dy)], 1)
    down = torch.stack([-sin, cos, sin * dx - cos * dy], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [len(art), 4, side, side], align_corners=False)
    return F.grid_sample(art, grid, align_corners=False)


def background(back: Tensor, side: int) -> Tensor:
    """Rows (B, BACK) -> (B, 3, side, side) in 0..1."""
    place = (torch.arange(side, device=back.device) + 0.5) / side - 0.5
    kind, angle, frequency, phase = (back[:, k].view(-1, 1, 1) for k in (0, 7, 8, 9))
    across = place * torch.cos(angle) + place[:, None] * torch.sin(angle)  # (B, H, W)
    down = place[:, None] * torch.cos(angle) - place * torch.sin(angle)
    sharp = side / frequency / 4
    waves = [torch.sin(2 * math.pi * (some * frequency + phase)) for some in (across, down)]
    cells = [((some * frequency + phase) % 1 - 0.5) for some in (across, down)]
    share = torch.zeros_like(across)
    share = torch.where(kind == FADING, (across + 0.5).clamp(0, 1), share)
    share = torch.where(kind == STRIPES, torch.sigmoid(waves[0] * sharp), share)
    share = torch.where(kind == CHECKS, torch.sigmoid(waves[0] * waves[1] * sharp * 2), share)
    dots = torch.sigmoid((0.27 - (cells[0].square() + cells[1].square()).sqrt()) * 4 * sharp)
    share = torch.where(kind == DOTS, dots, share)[:, None]
    one, other = back[:, 1:4, None, None], back[:, 4:7, None, None]
    return one + (other - one) * share


def sketched(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 as pencil drawings: lines where lightness changes, soft tones where it is dark."""

    def colour(rgb: tuple[float, ...]) -> Tensor:
        return torch.tensor(rgb, device=x.device, dtype=x.dtype).view(3, 1, 1)

    light = (x * colour((0.3, 0.59, 0.11))).sum(1, keepdim=True)
    bell = torch.tensor([1.0, 4, 6, 4, 1], device=x.device, dtype=x.dtype) / 16
    soft = F.conv2d(F.pad(light, (2, 2, 2, 2), mode="replicate"), (bell[:, None] * bell)[None, None])
    around = F.pad(soft, (1, 1, 1, 1), mode="replicate")
    across = around[..., 1:-1, 2:] - around[..., 1:-1, :-2]
    down = around[..., 2:, 1:-1] - around[..., :-2, 1:-1]
    lines, tones = 1.7 * (across.square() + down.square()).sqrt(), (0.5 - soft).clamp_min(0)
    ink = 0.9 * (lines + 0.22 * tones).clamp(0, 1)
    return (colour(PAPER) * (1 - ink) + colour(PENCIL) * ink) * 2 - 1
