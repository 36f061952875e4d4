"""Train a ControlNet on edges for the finished model: WORK/relatives/edges/. Resumes from WORK/control.pt.

A copy of the U-Net's first half reads the edges and adds to what the second half sees (Zhang et al. 2023, arXiv
2302.05543).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bank import Bank
from common import Log, save_json, seconds_of, set_up_torch, trained
from export import UPSTREAM, write_weights
from faster import sped_up
from models import read_text
from optim import Optimiser, learning_rate, precision
from PIL import Image
from sheets import to_pixels
from state import State
from torch import Tensor, nn
from train import trained_pair

from sfumato.models import ControlNetModel
from sfumato.preprocess import prepare

HINT = (16, 32, 64, 96)  # channels from the edges' full size to the latents'


def edges_of(x: Tensor) -> Tensor:
    """(B, 1, H, W) bool: the edges that Sfumato's `canny` finds in pictures in -1..1."""
    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(lambda one: np.asarray(prepare("canny", Image.fromarray(one)))[..., 0], to_pixels(x)))
    return torch.from_numpy(np.stack(lines) > 0)[:, None].to(x.device)


def step_of(pair: nn.Module, control: nn.Module, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """Mean squared error of v, with the edges (B, 1, H, W) last."""

    def step(x: Tensor, t: Tensor, tokens: Tensor, v: Tensor, edges: Tensor) -> Tensor:
        hint = edges.float().expand(-1, 3, -1, -1)
        with torch.autocast(x.device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            made = controlled(pair.unet, control, x, t, read_text(pair.text, tokens), hint)
        return (made.float() - v).square().mean()

    return step


def controlled(unet: nn.Module, control: nn.Module, x: Tensor, t: Tensor, words: Tensor, hint: Tensor) -> Tensor:
    """(B, C, h, w), (B,), (B, T, width), white lines on black (B, 3, H, W) in 0..1 -> (B, C, h, w)."""
    down, middle = control(x, t, words, hint, return_dict=False)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return unet(x, t, words, **added, return_dict=False)[0]


def build_control(pair: nn.Module) -> ControlNetModel:
    """A copy of the U-Net's first half that adds nothing yet."""
    return ControlNetModel.from_unet(pair.unet, conditioning_embedding_out_channels=HINT)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Train on scenes and their edges."""
    device, batch = set_up_torch(row.seed, row.threads), row.control_batch
    pair = trained_pair(row, work, device)
    control = build_control(pair).to(device, memory_format=torch.channels_last).requires_grad_(True)
    bank, step = Bank(row, work, device), step_of(pair, control, precision(device))
    bank.more = lambda x, _: (edges_of(x),)
    if row.compiled:
        step = sped_up("control", control, step, bank.noisy(0, batch), log)
    budget = {"steps": row.control_steps, "seconds": seconds_of(row, row.control_seconds)}
    state = State(work / "control.pt", control, Optimiser(control, row.muon), 0.995, **budget)
    log(f"control: {sum(p.numel() for p in control.parameters()) / 1e6:.2f} M parameters, {state.speed(batch)}")
    rate_at = partial(learning_rate, row.control_lr, warmup=0.03, cooldown=0.4)
    how = {"every": row.log_every, "batch": batch, "minutes": minutes}
    state.run("control", lambda at: step(*bank.noisy(at, batch)), rate_at, log, **how)
    folder = work / "relatives" / "edges"
    write_weights(folder / "diffusion_pytorch_model.safetensors", state.average.weights)
    names = {"_class_name": "ControlNetModel", "_diffusers_version": UPSTREAM}
    save_json(folder / "config.json", {**names, **control.config.to_dict()})


if __name__ == "__main__":
    trained(__doc__, "control", train)
