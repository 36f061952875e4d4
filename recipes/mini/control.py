"""Train a ControlNet on edges for the finished model: WORK/relatives/edges/. Resumes from WORK/control.pt.

A copy of the U-Net's first half reads the edges and adds to what the second half sees (Zhang et al. 2023, arXiv
2302.05543).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bank import Bank
from common import Log, save_json, set_up_torch, trained
from export import write_weights
from models import read_text
from optim import Optimiser, learning_rate, precision
from state import State
from torch import Tensor
from train import trained_pair

from sfumato.models import ControlNetModel

HINT = (16, 32, 64, 96)  # channels from the edges' full size to the latents'
STEEP = 0.35  # what counts as an edge, in -1..1 over two pixels


def edges_of(x: Tensor) -> Tensor:
    """White lines on black (B, 3, H, W) in 0..1, where pictures in -1..1 change steeply."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs().amax(1, keepdim=True)
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs().amax(1, keepdim=True)
    return ((across + down) > STEEP).float().expand(-1, 3, -1, -1)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Train on scenes and their edges."""
    device = set_up_torch(row.seed, row.threads)
    pair = trained_pair(row, work, device)
    control = ControlNetModel.from_unet(pair.unet, conditioning_embedding_out_channels=HINT)
    control = control.to(device, memory_format=torch.channels_last).requires_grad_(True)
    budget = {"steps": row.control_steps, "seconds": row.control_seconds}
    state = State(work / "control.pt", control, Optimiser(control, row.muon), 0.995, **budget)
    bank, dtype, batch = Bank(row, work, device), precision(device), row.control_batch
    log(f"control: {sum(p.numel() for p in control.parameters()) / 1e6:.2f} M parameters, {state.speed(batch)}")

    def loss_at(step: int) -> Tensor:
        pictures, tokens = bank.pictures(step, batch)
        x, t, v = bank.noised(bank.latents(pictures), step)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            words = read_text(pair.text, tokens)
            down, middle = control(x, t, words, edges_of(pictures), return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            made = pair.unet(x, t, words, **added, return_dict=False)[0]
        return (made.float() - v).square().mean()

    rate_at = partial(learning_rate, row.control_lr, warmup=0.03, cooldown=0.4)
    state.run("control", loss_at, rate_at, log, every=row.log_every, batch=batch, minutes=minutes)
    folder = work / "relatives" / "edges"
    write_weights(folder / "diffusion_pytorch_model.safetensors", state.average.weights)
    save_json(folder / "config.json", {"_class_name": "ControlNetModel", **control.config.to_dict()})


if __name__ == "__main__":
    trained(__doc__, "control", train)
