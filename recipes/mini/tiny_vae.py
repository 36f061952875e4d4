"""Distil the tiny autoencoder: the VAE's latents and images at a fraction of the work, for previews and drafts.

Plain convolutions, as in TAESD (github.com/madebyollin/taesd), taught by the VAE's own latents and decoded images.
Writes WORK/relatives/tiny-vae/. Resumes from WORK/tiny.pt; the teacher's images are in WORK/tiny_pool.pt.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from bank import Bank
from common import Log, load, save, save_json, set_up_torch, trained
from export import UPSTREAM, write_weights
from optim import Optimiser, learning_rate
from sharpen import OFF, error_of
from sheets import psnr, sheet, to_pixels
from state import State
from torch import Tensor, nn
from train_vae import held_pictures, unseen

from sfumato.models import AutoencoderTiny

TESTED = 24  # scenes with art that no training saw
CROP = 8  # latents across what is trained on at a time: the networks see no further than that


def tiny_config(row: SimpleNamespace) -> dict[str, object]:
    """Its `config.json`; every level has the same width."""
    levels, width = len(row.vae_channels), row.tiny_width
    return {
        "act_fn": "relu",
        "decoder_block_out_channels": [width] * levels,
        "encoder_block_out_channels": [width] * levels,
        "in_channels": 3,
        "latent_channels": row.latent_channels,
        "num_decoder_blocks": [2, 2, 1, 0],
        "num_encoder_blocks": [0, 1, 1, 2],
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    }


@torch.no_grad()
def pool_of(row: SimpleNamespace, path: Path, bank: Bank, log: Log) -> dict[str, Tensor]:
    """Scenes as the VAE sees them: pictures, decoded images (uint8), latents (unit scale); the last are for tests."""
    held, rows = held_pictures(path.parent), bank.writer.many(6_000_000 + row.seed, 2 * row.tiny_scenes)["rows"]
    strange = unseen(rows, held)
    tested = rows[strange if strange.any() else ~strange][:TESTED]  # little art has none that is held out
    chosen = torch.from_numpy(rows[~strange][: row.tiny_scenes]), torch.from_numpy(tested)
    made: dict[str, list[Tensor]] = {"pictures": [], "images": [], "latents": []}
    for part in torch.cat(chosen).split(16):
        x = bank.sprites.paint(part.to(bank.device)).contiguous(memory_format=torch.channels_last)
        latents = bank.latents(x)
        images = bank.vae.decode(latents / bank.vae.config.scaling_factor).sample
        for name, value in (("pictures", x), ("images", images)):
            made[name].append(((value.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
        made["latents"].append(latents.half().cpu())
        if len(made["latents"]) % 16 == 0:
            log(f"tiny-vae: {16 * len(made['latents'])} scenes decoded")
    pool = {name: torch.cat(parts) for name, parts in made.items()} | {"tested": torch.tensor(len(chosen[1]))}
    save(path, pool)
    return pool


def batch_of(pool: dict[str, Tensor], row: SimpleNamespace, step: int, device: torch.device) -> tuple[Tensor, ...]:
    """Pieces of scenes: pictures, the VAE's images of them, and latents."""
    generator = torch.Generator().manual_seed(row.seed * 1_000_003 + step)
    count, side = len(pool["latents"]) - int(pool["tested"]), pool["latents"].shape[-1]
    crop, factor = min(CROP, side), row.size // side
    places = torch.randint(side - crop + 1, (row.tiny_batch, 2), generator=generator).tolist()
    chosen = torch.randint(count, (row.tiny_batch,), generator=generator).tolist()

    def cut(name: str, unit: int) -> Tensor:
        return torch.stack(
            [
                pool[name][k, :, y * unit : (y + crop) * unit, x * unit : (x + crop) * unit]
                for k, (y, x) in zip(chosen, places, strict=True)
            ]
        ).to(device)

    pictures, images = (cut(name, factor).float() / 127.5 - 1 for name in ("pictures", "images"))
    return pictures, images, cut("latents", 1).float()


def loss_of(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Errors of the decoder, on latents that are a little off as a U-Net's are, and of the encoder."""
    pictures, images, latents = (part.contiguous(memory_format=torch.channels_last) for part in batch)
    level = OFF * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = (level * torch.randn(latents.shape, generator=generator)).to(latents)
    return error_of(model.decoder(latents + noise), images) + 0.2 * (model.encoder(pictures) - latents).square().mean()


@torch.no_grad()
def report(model: nn.Module, pool: dict[str, Tensor], work: Path, log: Log) -> None:
    """PSNR on unseen art against the VAE's images, and a sheet: the VAE over the tiny decoder over both tiny halves."""
    tested = slice(-int(pool["tested"]), None)
    pictures, images = (pool[name][tested].float() / 127.5 - 1 for name in ("pictures", "images"))
    made = model.decode(pool["latents"][tested].float()).sample
    both = model.decode(model.encode(pictures).latents).sample
    told = [f"{psnr(some, images).mean():.2f}" for some in (made, both)]
    log(f"tiny-vae: unseen art {told[0]} dB against the VAE's images, {told[1]} dB with its own encoder")
    lines = [to_pixels(some[start : start + 12]) for start in (0, 12) for some in (images, made, both)]
    sheet(work / "sheets" / "tiny-vae.png", torch.cat([torch.from_numpy(line) for line in lines]).numpy(), 12)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    device = set_up_torch(row.seed, row.threads)
    path = work / "tiny_pool.pt"
    pool = load(path) if path.exists() else pool_of(row, path, Bank(row, work, device), log)
    model = AutoencoderTiny(**tiny_config(row)).to(device, memory_format=torch.channels_last)
    budget = {"steps": row.tiny_steps, "seconds": row.tiny_seconds}
    state = State(work / "tiny.pt", model, Optimiser(model, row.muon, weight_decay=0.0), 0.995, **budget)
    log(f"tiny-vae: {sum(p.numel() for p in model.parameters()) / 1e3:.0f} k parameters, {state.speed(row.tiny_batch)}")

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(row.seed * 7_000_003 + step)
        return loss_of(model, batch_of(pool, row, step, device), generator)

    rate_at = partial(learning_rate, row.tiny_lr, warmup=0.02, cooldown=0.5)
    how = {"every": 2 * row.log_every, "batch": row.tiny_batch, "minutes": minutes}
    state.run("tiny-vae", loss_at, rate_at, log, **how)
    model.load_state_dict(state.average.weights)
    report(model.cpu(), pool, work, log)
    folder = work / "relatives" / "tiny-vae"
    write_weights(folder / "diffusion_pytorch_model.safetensors", state.average.weights)
    names = {"_class_name": "AutoencoderTiny", "_diffusers_version": UPSTREAM}
    save_json(folder / "config.json", {**names, **tiny_config(row)})


if __name__ == "__main__":
    trained(__doc__, "tiny-vae", train)
