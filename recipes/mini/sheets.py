"""Sample sheets: grids of pictures to look at while a step trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import atomic
from PIL import Image
from torch import Tensor


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1 -> (B, H, W, 3) uint8."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def sheet(path: Path, pictures: np.ndarray, columns: int, zoom: int = 1) -> None:
    """Lay (B, H, W, 3) uint8 pictures out in rows of `columns` and write a PNG."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2), columns * (width + 2), 3), 200, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + 2), index % columns * (width + 2)
        canvas[y : y + height, x : x + width] = picture
    image = Image.fromarray(canvas)
    with atomic(path) as partial:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(partial, "PNG")


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB, for pictures in -1..1."""
    error = (made.clamp(-1, 1) - wanted).square().flatten(1).mean(1).clamp_min(1e-10)
    return 10 * torch.log10(4 / error)
