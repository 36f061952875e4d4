"""Train a ControlNet on edges for the finished model: WORK/relatives/edges/. Resumes from WORK/control.pt.

A copy of the U-Net's first half reads the edges and adds to what the second half sees (Zhang et al. 2023, arXiv
2302.05543). Written as the reference library's ControlNetModel.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bank import Bank
from common import Log, arguments, need, save_json, set_up_torch
from models import read_text, unet_config
from optim import Optimiser, learning_rate, precision
from safetensors.torch import save_file
from state import State, averaged
from torch import Tensor, nn
from train import build_pair

from sfumato.models.attention import Context

HINT = (16, 32, 64, 96)  # channels from the edges' full size to the latents'
STEEP = 0.35  # what counts as an edge, in -1..1 over two pixels


def edges_of(x: Tensor) -> Tensor:
    """White lines on black (B, 3, H, W) in 0..1, where pictures in -1..1 change steeply."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs().amax(1, keepdim=True)
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs().amax(1, keepdim=True)
    return ((across + down) > STEEP).float().expand(-1, 3, -1, -1)


def blank(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all weights 0: at the start nothing is added."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Hint(nn.Module):
    """Edges to what is added to the U-Net's first features."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, HINT[0], 3, padding=1)
        pairs = itertools.pairwise(HINT)
        self.blocks = nn.ModuleList(
            nn.Conv2d(a, out, 3, padding=1, stride=stride) for a, b in pairs for out, stride in ((a, 1), (b, 2))
        )
        self.conv_out = blank(nn.Conv2d(HINT[-1], out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/8, W/8)."""
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The first half of a U-Net with a hint, and what it adds to each skip and to the middle."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        half = copy.deepcopy(unet)
        self.conv_in, self.time_embedding = half.conv_in, half.time_embedding
        self.down_blocks, self.mid_block = half.down_blocks, half.mid_block
        widths = unet.config.block_out_channels
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (1 + (level < len(widths) - 1))
        self.controlnet_cond_embedding = Hint(widths[0])
        self.controlnet_down_blocks = nn.ModuleList(blank(nn.Conv2d(width, width, 1)) for width in skips)
        self.controlnet_mid_block = blank(nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(self, x: Tensor, time: object, words: Tensor, edges: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is added to the skips, in their order, and to the middle."""
        context = Context(words)
        x = self.conv_in(x) + self.controlnet_cond_embedding(edges)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        middle = self.mid_block(skips[-1], time, context)
        added = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return added, self.controlnet_mid_block(middle)


def controlled(unet: nn.Module, control: ControlNet, x: Tensor, t: Tensor, words: Tensor, edges: Tensor) -> Tensor:
    """The U-Net's prediction with the control's additions."""
    time = unet.moment(x, t)
    own = type(time)(unet.conv_act(control.time_embedding(unet._sinusoid(t, x.dtype))))
    added, middle = control(x, own, words, edges)
    context = Context(words)
    skips = [unet.conv_in(x)]
    for block in unet.down_blocks:
        skips += block(skips[-1], time, context)
    h = unet.mid_block(skips[-1], time, context) + middle
    skips = [skip + more for skip, more in zip(skips, added, strict=True)]
    for block in unet.up_blocks:
        h = block(h, time, context, skips)
    return unet.conv_out(unet.conv_norm_out(h, unet.conv_act))


def write(folder: Path, weights: dict[str, Tensor], row: SimpleNamespace) -> None:
    """`config.json` and weights in fp16."""
    config = unet_config(row)
    left_out = ("sample_size", "out_channels", "up_block_types", "center_input_sample")
    kept = {key: value for key, value in config.items() if key not in left_out}
    hints = {"conditioning_embedding_out_channels": list(HINT), "conditioning_channels": 3}
    save_json(folder / "config.json", {"_class_name": "ControlNetModel", **kept, **hints})
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Train on scenes and their edges."""
    device = set_up_torch(row.seed, row.threads)
    pair = build_pair(row, work).to(device, memory_format=torch.channels_last)
    pair.load_state_dict(averaged(need(work / "train.pt", "train.py")))
    pair.requires_grad_(False)
    control = ControlNet(pair.unet).to(device, memory_format=torch.channels_last).requires_grad_(True)
    budget = {"steps": row.control_steps, "seconds": row.control_seconds}
    state = State(work / "control.pt", control, Optimiser(control, row.muon), 0.995, **budget)
    bank, dtype, batch = Bank(row, work, device), precision(device), row.control_batch
    log(f"control: {sum(p.numel() for p in control.parameters()) / 1e6:.2f} M parameters, {state.speed(batch)}")
    while state.goes_on(minutes):
        pictures, tokens = bank.pictures(state.step, batch)
        x, t, v = bank.noised(bank.latents(pictures), state.step)
        with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
            made = controlled(pair.unet, control, x, t, read_text(pair.text, tokens), edges_of(pictures))
        loss = (made.float() - v).square().mean()
        state.update(loss, learning_rate(row.control_lr, state.done, 0.03, 0.4))
        if state.step % row.log_every == 0:
            log(f"control: loss {float(loss.detach()):.4f}, {state.speed(batch)}")
    state.keep()
    write(work / "relatives" / "edges", state.average.weights, row)


def main() -> None:
    options = {"--minutes": {"type": float, "default": 0.0, "help": "stop (resumable) after so many minutes"}}
    args, row, work = arguments(__doc__, options)
    train(row, work, Log(work / "control.log"), args.minutes)


if __name__ == "__main__":
    main()
