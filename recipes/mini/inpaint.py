"""Train inpainting weights from the finished model: WORK/relatives/inpaint/. Resumes from WORK/inpaint.pt.

The U-Net also reads a mask (1: to be painted) and the latents of the picture without what is under it, as Stable
Diffusion's inpainting weights do: channels are noisy latents, mask, masked latents.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bank import Bank
from common import Log, save_json, seconds_of, set_up_torch, trained
from export import INDEX, UPSTREAM, calmed, write_weights
from faster import sped_up
from models import unet_config
from optim import Optimiser, learning_rate, precision
from state import State
from torch import Tensor
from train import Pair, step_of, trained_pair

from sfumato.models import UNet2DConditionModel

WHOLE = 0.15  # share of the masks that hide everything
BLOBS = 3


def masks(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(B, 1, side, side) of 0 and 1: boxes and discs, one to three of them, or everything."""
    device = generator.device
    place = (torch.arange(side, device=device) + 0.5) / side

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    mask = torch.zeros(count, side, side, device=device)
    for number in range(BLOBS):
        x, y = draw(count, 1, 1), draw(count, 1, 1)
        width, height = 0.1 + 0.25 * draw(count, 1, 1), 0.1 + 0.25 * draw(count, 1, 1)
        across, down = (place - x).abs() / width, (place[:, None] - y).abs() / height
        shape = torch.where(draw(count, 1, 1) < 0.5, torch.maximum(across, down), (across**2 + down**2).sqrt())
        there = draw(count, 1, 1) < (1.0, 0.5, 0.3)[number]
        mask = torch.where(there & (shape < 1), torch.ones_like(mask), mask)
    return torch.where(draw(count, 1, 1) < WHOLE, torch.ones_like(mask), mask)[:, None]


def inpainting_config(row: SimpleNamespace) -> dict:
    return {**unet_config(row), "in_channels": 2 * row.latent_channels + 1}


def widened(pair: Pair, row: SimpleNamespace) -> Pair:
    """The pair with a U-Net that reads more channels, which count for nothing yet."""
    unet = UNet2DConditionModel(**inpainting_config(row))
    weights = pair.unet.state_dict()
    first = torch.zeros_like(unet.conv_in.weight)
    first[:, : row.latent_channels] = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": first})
    return Pair(pair.text, unet)


def hidden(bank: Bank, pictures: Tensor, mask: Tensor) -> Tensor:
    """Mask and masked latents (B, 1 + C, h, w) of pictures and a mask of their size."""
    latents = bank.latents(pictures * (mask < 0.5))
    return torch.cat([F.interpolate(mask, size=latents.shape[-2:], mode="nearest"), latents], 1)


def build_inpaint(row: SimpleNamespace, work: Path) -> Pair:
    """The trained pair, its U-Net widened; the text encoder stays as it is."""
    pair = widened(trained_pair(row, work, torch.device("cpu")), row)
    pair.unet.requires_grad_(True)
    return pair


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Train the U-Net on scenes with holes."""
    device, batch = set_up_torch(row.seed, row.threads), row.inpaint_batch
    pair = build_inpaint(row, work).to(device, memory_format=torch.channels_last)
    bank, plain = Bank(row, work, device), step_of(pair, precision(device))

    def more(x: Tensor, step: int) -> tuple[Tensor]:
        mask = masks(len(x), x.shape[-1], torch.Generator(device).manual_seed(step))
        return (hidden(bank, x, mask),)

    def step(x: Tensor, t: Tensor, tokens: Tensor, v: Tensor, around: Tensor) -> Tensor:
        return plain(torch.cat([x, around], 1), t, tokens, v)

    bank.more = more
    if row.compiled:
        step = sped_up("inpaint", pair.unet, step, bank.noisy(0, batch), log)
    budget = {"steps": row.inpaint_steps, "seconds": seconds_of(row, row.inpaint_seconds)}
    state = State(work / "inpaint.pt", pair.unet, Optimiser(pair.unet, row.muon), 0.995, **budget)
    log(f"inpaint: {state.speed(batch)}")
    rate_at = partial(learning_rate, row.inpaint_lr, warmup=0.03, cooldown=0.4)
    how = {"every": row.log_every, "batch": batch, "minutes": minutes}
    state.run("inpaint", lambda at: step(*bank.noisy(at, batch)), rate_at, log, **how)
    folder = work / "relatives" / "inpaint" / "unet"
    save_json(folder.parent / "model_index.json", {**INDEX, "_class_name": "StableDiffusionInpaintPipeline"})
    write_weights(folder / "diffusion_pytorch_model.safetensors", calmed(state.average.weights))
    names = {"_class_name": "UNet2DConditionModel", "_diffusers_version": UPSTREAM}
    save_json(folder / "config.json", {**names, **inpainting_config(row)})


if __name__ == "__main__":
    trained(__doc__, "inpaint", train)
