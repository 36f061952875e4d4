"""Train the autoencoder on painted scenes: pictures -> latents -> pictures. Resumes from WORK/vae.pt."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import MINUTES, Log, arguments, need, set_up_torch
from compose import Sprites
from faster import Faster
from models import build_vae
from optim import Optimiser, learning_rate, precision
from scenes import COLUMNS, THING, THINGS, is_judges
from sheets import psnr, sheet, to_pixels
from state import State
from torch import Tensor, nn

NOISE = 0.15  # standard deviation added to the latents while training
PERMUTE = 0.25  # share of the batches with their colours swapped
HELD = (32, 5)  # of every 32 emoji the fifth is never seen


def scene_rows(work: Path, judge: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All scenes to train on, or those of the judge: numbers, tokens and what is to be found."""
    paths = sorted(need(work / "scenes", "scenes.py").glob("*.npz"))
    parts = [np.load(path) for path in paths if is_judges(int(path.stem)) == judge]
    rows, tokens, found = (np.concatenate([part[key] for part in parts]) for key in ("rows", "tokens", "found"))
    return rows, tokens, found


def held_pictures(work: Path) -> np.ndarray:
    """Which pictures (N,) bool the autoencoder never sees."""
    return np.load(need(work / "art.npz", "render.py"))["emoji"] % HELD[0] == HELD[1]


def unseen(rows: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Which scenes hold a picture that is held out."""
    pictures = rows[:, : THINGS * THING : THING].astype(int)
    return (held[pictures.clip(0)] & (pictures >= 0)).any(1)


def alone_on_white(pictures: np.ndarray) -> Tensor:
    """Scenes (N, COLUMNS) of single pictures as the sets drew them."""
    rows = torch.full((len(pictures), COLUMNS), -1.0)
    rows[:, :THING] = torch.tensor([0, 0.5, 0.5, 1, 0, 0, 0, 1.0])
    rows[:, 0] = torch.from_numpy(pictures)
    rows[:, THINGS * THING :] = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 4, 0.0])
    return rows


def colours(x: Tensor, factor: int) -> Tensor:
    """Lightness, green against magenta, red against blue of each latent cell: (B, 3, H, W) -> (B, 3, h, w)."""
    red, green, blue = F.avg_pool2d(x, factor).unbind(1)
    return torch.stack([1.5 * (red + green + blue) / 3 - 0.5, 4 * (green - (red + blue) / 2), 2 * (red - blue)], 1)


def step_of(vae: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of pictures, latent noise and the weight of the colours.

    Error in pixels and edges, three latents held to the cell's colour, and latents held near 0. Left alone, no latent
    learns green against magenta and hearts turn brown while the error looks fine; supervised latents prevent it. The
    decoder sees the means with a fixed small noise: with a learned one it came to ignore a supervised latent, whose
    noise then grew to the prior's. The variance that the encoder states is held to that noise.
    """

    def step(x: Tensor, noise: Tensor, guide: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            moments = vae.quant_conv(vae.encoder(x))
            mean, logvar = moments.chunk(2, 1)
            made = vae.decoder(vae.post_quant_conv(mean + noise))
        mean, error = mean.float(), made.float() - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        chroma = (mean[:, :3] - colours(x, x.shape[-1] // mean.shape[-1])).square().mean()
        stated = (logvar.float() - 2 * math.log(NOISE)).square().mean()
        loss = 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.25 * edges
        return loss + guide * chroma + 1e-3 * stated + 1e-4 * mean.square().mean()

    return step


def noise_for(x: Tensor, row: SimpleNamespace, generator: torch.Generator) -> Tensor:
    side = row.size // 2 ** (len(row.vae_channels) - 1)
    shape = (len(x), row.latent_channels, side, side)
    return NOISE * torch.randn(shape, generator=generator, device=x.device)


def example(row: SimpleNamespace, work: Path, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor], tuple]:
    """A model, its step and inputs of the shapes that training has."""
    vae = build_vae(row).to(device, memory_format=torch.channels_last)
    x = torch.rand(row.vae_batch, 3, row.size, row.size, device=device)
    noise = noise_for(x, row, torch.Generator(device))
    return vae, step_of(vae, precision(device)), (x, noise, torch.tensor(0.5, device=device))


@torch.no_grad()
def held_out_psnr(vae: nn.Module, sprites: Sprites, rows: Tensor, path: Path | None = None) -> float:
    """Mean PSNR over scenes of held-out pictures; with a path, a sheet of originals over reconstructions."""
    values, pairs = [], []
    for part in rows.split(32):
        x = sprites.paint(part.to(sprites.device))
        made = vae.decode(vae.encode(x).latent_dist.mean).sample.float()
        values.append(psnr(made, x).cpu())
        pairs.append((to_pixels(x), to_pixels(made)))
    if path is not None:
        lines = [half[k : k + 16] for pair in pairs for k in (0, 16) for half in pair if len(half) >= k + 16]
        if lines:
            sheet(path, np.concatenate(lines[:12]), 16)
    return float(torch.cat(values).mean())


def probes(rows: np.ndarray, held: np.ndarray, seed: int, count: int = 96) -> dict[str, Tensor]:
    """What the autoencoder is measured on: held-out art alone on white, and scenes with it."""
    rng = np.random.default_rng(seed)
    art = rng.permutation(np.flatnonzero(held))[:count]
    scenes = rows[unseen(rows, held)][:count]
    return {"art": alone_on_white(art), "scenes": torch.from_numpy(scenes)}


def train(row: SimpleNamespace, work: Path, log: Log, sprites: Sprites | None = None, minutes: float = 0.0) -> None:
    """Train for the budget's pictures or seconds."""
    device = set_up_torch(row.seed, row.threads)
    sprites = sprites or Sprites.of(work, device)
    rows, held = scene_rows(work)[0], held_pictures(work)
    seen = torch.from_numpy(rows[~unseen(rows, held)]).to(device)
    vae = build_vae(row).to(device, memory_format=torch.channels_last)
    twin = build_vae(row).to(device).eval()
    steps = row.vae_images // row.vae_batch
    state = State(work / "vae.pt", vae, Optimiser(vae, row.muon), 0.998, steps=steps, seconds=row.vae_seconds)
    faster = Faster("vae", vae, step_of(vae, precision(device)), work, log)
    millions, batch, tests = sum(p.numel() for p in vae.parameters()) / 1e6, row.vae_batch, probes(rows, held, row.seed)
    log(f"vae: {millions:.2f} M parameters, {precision(device) or 'float32'}, {len(seen)} scenes, {state.speed(batch)}")
    while state.goes_on(minutes):
        generator = torch.Generator(device).manual_seed(row.seed * 1_000_003 + state.step)
        chosen = torch.randint(len(seen), (batch,), generator=generator, device=device)
        x = sprites.paint(seen[chosen])
        if np.random.default_rng((row.seed, state.step)).random() < PERMUTE:
            x = x[:, np.random.default_rng((row.seed, state.step, 1)).permutation(3).tolist()]
        x = x.contiguous(memory_format=torch.channels_last)
        guide = torch.tensor(0.5 if state.done < 0.12 else 0.05, device=device)
        inputs = (x, noise_for(x, row, generator), guide)
        try:
            loss = faster(*inputs)
            state.update(loss, learning_rate(row.vae_lr, state.done, 0.02, 0.4))
        except torch.cuda.OutOfMemoryError:
            batch = max(batch // 2, 1)
            faster.give_up()
            log(f"vae: out of memory, batch {batch} from here")
            continue
        if state.step % row.log_every == 0:
            faster.look(*inputs)
            if not math.isfinite(value := float(loss.detach())):
                state.fall_back()
            log(f"vae: loss {value:.4f}, {state.speed(batch)}")
        if state.step % (20 * row.log_every) == 0:
            report(state, twin, sprites, tests, work, log)
    state.keep()
    report(state, twin, sprites, tests, work, log)


def report(state: State, twin: nn.Module, sprites: Sprites, tests: dict, work: Path, log: Log) -> None:
    twin.load_state_dict(state.average.weights)
    values = [f"{held_out_psnr(twin, sprites, rows, work / f'vae_{name}.png'):.2f}" for name, rows in tests.items()]
    log(f"vae: held-out art, scenes {', '.join(values)} dB at step {state.step}")


def main() -> None:
    args, row, work = arguments(__doc__, MINUTES)
    train(row, work, Log(work / "vae.log"), minutes=args.minutes)


if __name__ == "__main__":
    main()
