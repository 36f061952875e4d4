"""Fold the latents' own mean and scale into the VAE and encode the trained pictures.

Writes WORK/vae_final.pt and WORK/latents.pt.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import Log, arguments, need, save, set_up_torch
from models import SCALING_FACTOR, build_vae
from sheets import psnr, to_tensor
from state import averaged
from torch import Tensor, nn


@torch.no_grad()
def encode(vae: nn.Module, pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> mean latents (N, C, h, w), as the VAE gives them."""
    device = next(vae.parameters()).device
    batches = (to_tensor(pictures[k : k + 32]).to(device) for k in range(0, len(pictures), 32))
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches]).float().cpu()


@torch.no_grad()
def fold(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Make latents * SCALING_FACTOR zero-mean and unit-std per channel, exactly, in the two 1x1 convolutions."""
    factor = (1 / (std * SCALING_FACTOR)).to(vae.quant_conv.weight)
    shift = mean.to(factor)
    channels = len(factor)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    bias[:channels] = (bias[:channels] - shift) * factor
    bias[channels:] += 2 * factor.log()
    weight[:channels] *= factor.view(-1, 1, 1, 1)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight.flatten(1) @ shift
    vae.post_quant_conv.weight /= factor.view(1, -1, 1, 1)


def main() -> None:
    args, row, work = arguments(__doc__, {"--again": {"action": "store_true", "help": "replace what stands"}})
    if (work / "latents.pt").exists() and not args.again:
        print(f"encode: {work / 'latents.pt'} stands already")
        return
    run(row, work, Log(work / "encode.log"))


def run(row: SimpleNamespace, work: Path, log: Log) -> None:
    device = set_up_torch(row.seed, row.threads)
    vae = build_vae(row).to(device).eval()
    vae.load_state_dict(averaged(need(work / "vae.pt", "train_vae.py")))
    images = np.load(need(work / "art.npz", "render.py"))["images"]
    picture = np.load(need(work / "tokens.npz", "captions.py"))["picture"]
    probe = to_tensor(images[picture[:64]]).to(device)
    with torch.no_grad():
        before = vae.decode(vae.encode(probe).latent_dist.mean).sample
    latents = encode(vae, images[picture])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log(f"encode: std {[round(v, 2) for v in std.tolist()]}, mean {[round(v, 2) for v in mean.tolist()]}")
    fold(vae, mean, std)
    latents = encode(vae, images[picture]) * SCALING_FACTOR
    with torch.no_grad():
        after = vae.decode(vae.encode(probe).latent_dist.mean).sample
    change = float((after - before).abs().max())
    if change > 1e-2:
        raise RuntimeError(f"folding changed the pictures by {change}")
    save(work / "vae_final.pt", {"model": vae.state_dict()})
    save(work / "latents.pt", {"latents": latents})
    log(f"encode: {len(latents)} latents, folding changed pictures by {change:.1e}, {psnr(after, probe).mean():.2f} dB")


if __name__ == "__main__":
    main()
