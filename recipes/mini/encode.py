"""Fold the latents' own mean and scale into the VAE and encode the scenes: WORK/vae_final.pt and WORK/bank.pt."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import Log, arguments, need, save, set_up_torch
from compose import Sprites
from models import SCALING_FACTOR, build_vae
from optim import precision
from sheets import psnr
from state import averaged, publish
from torch import Tensor, nn
from train_vae import scene_rows

THUMB = 16  # pixels of the thumbnails that captions are compared with
PROBE = 4096  # scenes that the latents' mean and scale are measured on


@torch.no_grad()
def encode(vae: nn.Module, x: Tensor) -> Tensor:
    """Pictures -> mean latents (B, C, h, w), as the VAE gives them."""
    dtype = precision(x.device)
    with torch.autocast(x.device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
        return vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()


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


@torch.no_grad()
def folded(vae: nn.Module, probe: Tensor, sprites: Sprites, batch: int, log: Log) -> None:
    """Measure the latents of some scenes and fold them into the VAE; an error if pictures change by it."""
    x = sprites.paint(probe[:64])
    before = vae.decode(vae.encode(x).latent_dist.mean).sample.float()
    latents = torch.cat([encode(vae, sprites.paint(part)) for part in probe.split(batch)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log(f"encode: std {[round(v, 2) for v in std.tolist()]}, mean {[round(v, 2) for v in mean.tolist()]}")
    fold(vae, mean, std)
    after = vae.decode(vae.encode(x).latent_dist.mean).sample.float()
    change = float((after - before).abs().max())
    log(f"encode: folding changed pictures by {change:.1e}, {psnr(after, x).mean():.2f} dB")
    if change > (0.1 if x.is_cuda else 1e-2):  # a GPU convolves in fewer bits
        raise RuntimeError(f"folding changed the pictures by {change}")


@torch.no_grad()
def run(row: SimpleNamespace, work: Path, log: Log, sprites: Sprites | None = None) -> dict[str, Tensor]:
    """The bank: latents (N, C, h, w) fp16, tokens (N, V, T), thumbnails (N, 3, 16, 16) uint8, of N scenes."""
    device = set_up_torch(row.seed, row.threads)
    sprites = sprites or Sprites.of(work, device)
    vae = build_vae(row).to(device, memory_format=torch.channels_last).eval()
    vae.load_state_dict(averaged(need(work / "vae.pt", "train_vae.py")))
    rows, tokens, _ = (torch.from_numpy(some) for some in scene_rows(work))
    folded(vae, rows[:PROBE].to(device), sprites, row.encode_batch, log)
    save(work / "vae_final.pt", {"model": vae.state_dict()})
    publish("vae_final", vae.state_dict())
    start, latents, thumbs = time.monotonic(), [], []
    for part in rows.split(row.encode_batch):
        x = sprites.paint(part.to(device))
        latents.append((encode(vae, x) * SCALING_FACTOR).half())
        thumbs.append(((F.adaptive_avg_pool2d(x, THUMB) + 1) * 127.5).round().clamp(0, 255).byte())
        if row.encode_seconds and time.monotonic() - start > row.encode_seconds:
            break
    whole = torch.cat(latents)
    log(f"encode: {len(whole)} of {len(rows)} scenes in {time.monotonic() - start:.1f} s")
    return {"latents": whole, "tokens": tokens[: len(whole)].to(device), "thumbs": torch.cat(thumbs)}


def main() -> None:
    args, row, work = arguments(__doc__, {"--again": {"action": "store_true", "help": "replace what stands"}})
    if (work / "bank.pt").exists() and not args.again:
        print(f"encode: {work / 'bank.pt'} stands already")
        return
    bank = run(row, work, Log(work / "encode.log"))
    save(work / "bank.pt", {name: value.cpu() for name, value in bank.items()})


if __name__ == "__main__":
    main()
