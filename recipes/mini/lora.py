"""Teach a style as a LoRA: a pencil sketch. Writes WORK/relatives/sketch.safetensors. Resumes from WORK/sketch.pt.

Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), written with the names that kohya's scripts gave it.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from bank import Bank
from common import Log, seconds_of, set_up_torch, trained
from compose import sketched
from export import CALM, loud_layers
from faster import sped_up
from optim import Optimiser, learning_rate, precision
from safetensors.torch import save_file
from state import State
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train import step_of, trained_pair


class Lora(nn.Module):
    """A weight plus a product of two thin matrices."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with what was learned."""
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(unet: nn.Module, rank: int) -> nn.ModuleDict:
    """Put a LoRA on every linear layer and convolution but the outermost; returns them by the layers' names."""
    made = {}
    unet.requires_grad_(False)
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in ("conv_in", "conv_out"):
            lora = Lora(layer.weight, rank).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", lora)
            made[name.replace(".", "/")] = lora
    return nn.ModuleDict(made)


def write_kohya(path: Path, weights: dict[str, Tensor], unet: nn.Module) -> None:
    """The LoRAs of the exported U-Net's layers, by the names of kohya's files; a rank is its own alpha."""
    made, loud = {}, loud_layers(name for name, _ in unet.named_modules() if name.count(".") > 2)
    for key in (key.removesuffix(".down") for key in weights if key.endswith(".down")):
        name = key.replace("/", ".")
        down, up = weights[f"{key}.down"].half().cpu(), weights[f"{key}.up"].half().cpu()
        shape = unet.get_submodule(name).parametrizations.weight.original.shape
        up = up / CALM if name in loud else up
        if len(shape) == 4:
            down, up = down.view(len(down), *shape[1:]), up[..., None, None]
        stem = f"lora_unet_{name.replace('.', '_')}"
        made[f"{stem}.lora_down.weight"], made[f"{stem}.lora_up.weight"] = down.contiguous(), up.contiguous()
        made[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made, path, metadata={"format": "pt", "ss_network_module": "networks.lora"})
    path.chmod(0o644)


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    """Train on scenes as sketches; captions do not say so, so that no prompt has to."""
    device = set_up_torch(row.seed, row.threads)
    pair = trained_pair(row, work, device)
    lora, batch = add_lora(pair.unet, row.style_rank), row.lora_batch
    evenly = SimpleNamespace(**vars(row) | {"high_from": 100, "high_share": 0.95})  # details are drawn late
    bank, step = Bank(evenly, work, device), step_of(pair, precision(device))
    bank.change = sketched
    if row.compiled:
        step = sped_up("lora", lora, step, bank.noisy(0, batch), log)
    budget = {"steps": row.lora_steps, "seconds": seconds_of(row, row.lora_seconds)}
    state = State(work / "sketch.pt", lora, Optimiser(lora, False, weight_decay=0.0), 0.99, **budget)
    log(f"lora: {sum(p.numel() for p in lora.parameters()) / 1e6:.2f} M parameters, {state.speed(batch)}")
    how = {"every": row.log_every, "batch": batch, "minutes": minutes}
    rate_at = partial(learning_rate, row.lora_lr, warmup=0.03, cooldown=0.4)
    state.run("lora", lambda at: step(*bank.noisy(at, batch)), rate_at, log, **how)
    write_kohya(work / "relatives" / "sketch.safetensors", state.average.weights, pair.unet)


if __name__ == "__main__":
    trained(__doc__, "lora", train)
