"""Random adapters of every kind for our small networks, in every spelling of their keys."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.models.overlay import weight_shapes


def lora(shape: torch.Size, rank: int = 3, alpha: float | None = 2.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of kohya's names: lora_down, lora_up, alpha."""
    made = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=made) * 0.1
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=made) * 0.1
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    return parts if alpha is None else parts | {"alpha": torch.tensor(alpha)}


def kohya(modules: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Modules such as "unet.conv_in" under kohya's names."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    state = {}
    for name, parts in modules.items():
        role, _, path = name.partition(".")
        state |= {f"{prefix[role]}{path.replace('.', '_')}.{part}": one for part, one in parts.items()}
    return state


def random_lora(
    networks: dict[str, Any], *, alpha: float | None = 2.0, convolutions: bool = False, seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """A LoRA of mixed ranks for every attention layer of networks by role, and their filters if asked for."""
    modules = {}
    words = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    for role, network in networks.items():
        for number, (name, shape) in enumerate(weight_shapes(network).items()):
            path, _, last = name.rpartition(".")
            linear = len(shape) == 2 and path.endswith(words)
            if last == "weight" and (linear or (convolutions and len(shape) == 4)):
                modules[f"{role}.{path}"] = lora(shape, 1 + number % 4, alpha, seed + number)
    return modules
