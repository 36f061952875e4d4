"""Train the autoencoder on all art: pictures -> latents -> pictures. Resumes from WORK/vae.pt."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, arguments, need, set_up_torch
from models import build_vae
from optim import Optimiser, faster_precision, learning_rate
from sheets import psnr, sheet, to_pixels, to_tensor
from state import State
from torch import Tensor

NOISE = 0.1  # standard deviation added to the latents while training
PERMUTE, FLIP, SHIFT = 0.3, 0.5, 3  # shares of pictures with colours swapped, mirrored; pixels moved at most


def split(work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pictures, and the indices to train on and to hold out: every picture of each 32nd emoji."""
    art = np.load(need(work / "art.npz", "render.py"))
    held = art["emoji"] % 32 == 5
    return art["images"], np.flatnonzero(~held), np.flatnonzero(held)


def batch_of(images: np.ndarray, train: np.ndarray, count: int, seed: tuple[int, int]) -> Tensor:
    """A batch that is a function of the seed alone, so that a resumed run sees what an unbroken one would."""
    rng = np.random.default_rng(seed)
    made = np.empty((count, *images.shape[1:]), np.uint8)
    for row, index in enumerate(rng.choice(train, count)):
        picture = images[index]
        if rng.random() < PERMUTE:
            picture = picture[..., rng.permutation(3)]
        if rng.random() < FLIP:
            picture = picture[:, ::-1]
        wide = np.pad(picture, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=255)
        y, x = rng.integers(0, 2 * SHIFT + 1, 2)
        made[row] = wide[y : y + picture.shape[0], x : x + picture.shape[1]]
    return to_tensor(made)


def colours(x: Tensor, factor: int) -> Tensor:
    """Lightness, green against magenta, red against blue of each latent cell: (B, 3, H, W) -> (B, 3, h, w)."""
    red, green, blue = F.avg_pool2d(x, factor).unbind(1)
    return torch.stack([1.5 * (red + green + blue) / 3 - 0.5, 4 * (green - (red + blue) / 2), 2 * (red - blue)], 1)


def loss_of(vae: torch.nn.Module, x: Tensor, guide: float) -> tuple[Tensor, Tensor]:
    """Error in pixels and edges, three latents held to the cell's colour, and latents held near 0.

    Left alone, no latent learns green against magenta and hearts turn brown while the error looks fine;
    `guide` weighs the three supervised latents that prevent it. The decoder sees the means with a fixed small NOISE:
    with a learned one it came to ignore a supervised latent, whose noise then grew to the prior's. The variance that
    the encoder states is held to that noise.
    """
    posterior = vae.encode(x).latent_dist
    noise = torch.randn_like(posterior.mean) * NOISE
    made = vae.decode(posterior.mean + noise).sample.float()
    error = made - x
    squared = error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    wanted = colours(x, x.shape[-1] // posterior.mean.shape[-1])
    chroma = (posterior.mean[:, :3].float() - wanted).square().mean()
    stated = (posterior.logvar.float() - 2 * math.log(NOISE)).square().mean()
    prior = posterior.mean.float().square().mean()
    loss = 4 * squared + 0.5 * error.abs().mean() + 0.25 * edges + guide * chroma + 1e-3 * stated + 1e-4 * prior
    return loss, squared


@torch.no_grad()
def held_out_psnr(vae: torch.nn.Module, pictures: np.ndarray, path: Path | None = None) -> float:
    """Mean PSNR over held-out pictures; with a path, a sheet of originals over reconstructions."""
    vae.eval()
    device = next(vae.parameters()).device
    values, pairs = [], []
    for start in range(0, len(pictures), 32):
        x = to_tensor(pictures[start : start + 32]).to(device)
        made = vae.decode(vae.encode(x).latent_dist.mean).sample
        values.append(psnr(made, x).cpu())
        pairs.append((to_pixels(x), to_pixels(made)))
    if path is not None:
        rows = [half[k : k + 16] for pair in pairs for k in (0, 16) for half in pair if len(half) >= k + 16]
        sheet(path, np.concatenate(rows[:12]), 16)
    vae.train()
    return float(torch.cat(values).mean())


def measured_precision(vae: torch.nn.Module, x: Tensor, row: SimpleNamespace) -> torch.dtype | None:
    def step() -> None:
        loss_of(vae, x, 1.0)[0].backward()
        vae.zero_grad(set_to_none=True)

    return faster_precision(x.device, step)


def freeze_encoder(state: State) -> None:
    """Keep the latents as they are and train the decoder alone; the encoder becomes the averaged one, for good."""
    fixed = {k: v for k, v in state.average.weights.items() if k.startswith(("encoder.", "quant_conv."))}
    state.model.load_state_dict({**state.model.state_dict(), **fixed})
    for part in (state.model.encoder, state.model.quant_conv):
        part.requires_grad_(False)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float, decoder_only: bool) -> None:
    """Train until `row.vae_images` pictures were seen."""
    device = set_up_torch(row.seed, row.threads)
    images, train_set, held = split(work)
    vae, twin = build_vae(row).to(device), build_vae(row).to(device)
    state = State(work / "vae.pt", vae, Optimiser(vae, row.muon), 0.998)
    if decoder_only:
        freeze_encoder(state)
    dtype = measured_precision(vae, batch_of(images, train_set, 4, (0, 0)).to(device), row)
    total = max(row.vae_images // row.vae_batch, 1)
    millions = sum(p.numel() for p in vae.parameters()) / 1e6
    log(f"vae: {millions:.2f} M parameters, {dtype or 'float32'}, step {state.step}/{total}")
    sample = np.random.default_rng(row.seed).choice(held, min(96, len(held)), replace=False)
    errors = []
    while state.goes_on(total, minutes):
        x = batch_of(images, train_set, row.vae_batch, (row.seed, state.step)).to(device)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            loss, squared = loss_of(vae, x, 0.5 if state.step < 600 else 0.05)
        state.update(loss, learning_rate(row.vae_lr, state.step / total, 0.02, 0.4))
        errors.append(float(squared.detach()))
        if state.step % 200 == 0 or state.step == total:
            twin.load_state_dict(state.average.weights)
            value = held_out_psnr(twin, images[sample], work / "vae.png")
            done = f"{state.step}/{total} error {np.mean(errors):.5f}"
            log(f"vae: {done}, held-out {value:.2f} dB, {state.speed(row.vae_batch)}")
            errors.clear()
    state.keep()


def main() -> None:
    options = {"--minutes": {"type": float, "default": 0.0, "help": "stop (resumable) after so many minutes"}}
    options["--decoder-only"] = {"action": "store_true", "help": "leave the latents, and so the U-Net, as they are"}
    args, row, work = arguments(__doc__, options)
    train(row, work, Log(work / "vae.log"), args.minutes, args.decoder_only)


if __name__ == "__main__":
    main()
