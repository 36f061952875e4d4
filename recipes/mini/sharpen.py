"""Train the decoder alone, on latents as a painter makes them: a little off. The latents, and the U-Net, stay.

Starts from WORK/vae_final.pt and writes its decoder back there. Resumes from WORK/decoder.pt.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import torch
from common import Log, arguments, load, need, save, set_up_torch
from compose import Sprites
from encode import encode
from models import SCALING_FACTOR, build_vae
from optim import Optimiser, learning_rate, precision
from state import State, publish
from torch import Tensor, nn
from train_vae import alone_on_white, held_out_psnr, held_pictures, scene_rows, unseen

OFF = 0.25  # of the latents' spread: the most that is added to them


class Painter(nn.Module):
    """The half of the autoencoder that is trained."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Unit-scale latents -> pictures."""
        return self.decoder(self.post_quant_conv(latents / SCALING_FACTOR))


def error_of(made: Tensor, x: Tensor) -> Tensor:
    """Pixels and edges, counted more by their size than by its square: edges stay where they are and sharp."""
    error = made.float() - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def train(row: SimpleNamespace, work: Path, log: Log, sprites: Sprites | None = None) -> None:
    device = set_up_torch(row.seed, row.threads)
    sprites = sprites or Sprites.of(work, device)
    rows, held = scene_rows(work)[0], held_pictures(work)
    seen = torch.from_numpy(rows[~unseen(rows, held)]).to(device)
    vae = build_vae(row).to(device, memory_format=torch.channels_last)
    vae.load_state_dict(load(need(work / "vae_final.pt", "encode.py"))["model"])
    painter, dtype, batch = Painter(vae), precision(device), row.vae_batch
    budget = {"steps": row.sharpen_images // batch, "seconds": row.sharpen_seconds}
    state = State(work / "decoder.pt", painter, Optimiser(painter, row.muon), 0.998, **budget)
    art = alone_on_white(torch.from_numpy(held).nonzero()[:96, 0].numpy())
    log(f"sharpen: held-out art {held_out_psnr(vae, sprites, art):.2f} dB before")
    while state.goes_on():
        generator = torch.Generator(device).manual_seed(row.seed * 1_000_003 + state.step)
        chosen = torch.randint(len(seen), (batch,), generator=generator, device=device)
        x = sprites.paint(seen[chosen])
        latents = encode(vae, x) * SCALING_FACTOR
        level = OFF * torch.rand(batch, 1, 1, 1, generator=generator, device=device)
        latents = latents + level * torch.randn(latents.shape, generator=generator, device=device)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            made = painter(latents)
        loss = error_of(made, x)
        state.update(loss, learning_rate(0.5 * row.vae_lr, state.done, 0.02, 0.7))
        if state.step % (4 * row.log_every) == 0:
            if not math.isfinite(value := float(loss.detach())):
                state.fall_back()
            log(f"sharpen: loss {value:.4f}, {state.speed(batch)}")
    painter.load_state_dict(state.average.weights)
    log(f"sharpen: held-out art {held_out_psnr(vae, sprites, art):.2f} dB after")
    save(work / "vae_final.pt", {"model": vae.state_dict()})
    publish("vae_final", vae.state_dict())


def main() -> None:
    _, row, work = arguments(__doc__)
    train(row, work, Log(work / "sharpen.log"))


if __name__ == "__main__":
    main()
