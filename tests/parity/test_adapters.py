"""Merged weights against the oracles: every kind against LyCORIS' own modules, every dialect against the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.adapters.adapter import grouped
from sfumato.adapters.files import given
from sfumato.adapters.kinds import Change, bias_change, weight_change

lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is of the extra 'test'")

LAYERS = {
    "linear": lambda: nn.Linear(24, 32),
    "conv": lambda: nn.Conv2d(16, 32, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(16, 32, 1),
}
ALGORITHMS = {
    "locon": ("locon", "LoConModule", {}),
    "locon tucker": ("locon", "LoConModule", {"use_tucker": True}),
    "dora out": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "dora in": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "rslora": ("locon", "LoConModule", {"rs_lora": True}),
    "loha": ("loha", "LohaModule", {}),
    "loha tucker": ("loha", "LohaModule", {"use_tucker": True}),
    "loha dora": ("loha", "LohaModule", {"weight_decompose": True}),
    "lokr": ("lokr", "LokrModule", {"factor": 4}),
    "lokr tucker": ("lokr", "LokrModule", {"factor": 4, "use_tucker": True, "lora_dim": 2}),
    "lokr both": ("lokr", "LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "lokr full": ("lokr", "LokrModule", {"factor": 4, "full_matrix": True}),
    "lokr dora": ("lokr", "LokrModule", {"factor": 4, "weight_decompose": True}),
    "glora": ("glora", "GLoRAModule", {}),
    "ia3": ("ia3", "IA3Module", {}),
    "ia3 on input": ("ia3", "IA3Module", {"train_on_input": True}),
    "full": ("full", "FullModule", {}),
    "oft": ("diag_oft", "DiagOFTModule", {"constraint": 0}),
    "oft constrained": ("diag_oft", "DiagOFTModule", {"constraint": 0.001}),
    "oft rescaled": ("diag_oft", "DiagOFTModule", {"rescaled": True}),
    "boft": ("boft", "ButterflyOFTModule", {}),
    "boft rescaled": ("boft", "ButterflyOFTModule", {"rescaled": True}),
}


def trained(layer: nn.Module, algorithm: str, rank: int) -> nn.Module:
    """A module of LyCORIS on this layer, as if it had been trained."""
    from importlib import import_module

    name, kind, options = ALGORITHMS[algorithm]
    options = {"lora_dim": 4 * rank if name == "boft" else rank, "alpha": 1.5} | options
    module = getattr(import_module(f"lycoris.modules.{name}"), kind)("lora_unet_x", layer, 1.0, **options)
    made = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=made).to(parameter)
    return module


def merged_by(module: nn.Module, weight: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the module draws with. LoHa's and LoKr's merging (4.1.3) takes alpha / rank twice; `forward`, once as here."""
    if type(module).__name__ not in ("LohaModule", "LokrModule"):
        return module.get_merged_weight(multiplier=strength, shape=weight.shape)
    added = module.get_weight(weight.shape)
    if module.wd:
        return module.apply_weight_decompose(weight + added, strength), None
    return weight + strength * added, None


def change_of(module: nn.Module) -> Change:
    state = {f"lora_unet_x.{key}": one for key, one in module.state_dict().items() if "org" not in key}
    custom = module.custom_state_dict()
    if type(module).__name__ == "FullModule":  # which has not taken the place of the layer yet
        state = {"lora_unet_x.diff": module.weight.data, "lora_unet_x.diff_b": module.bias.data}
    elif custom is not None:
        state = {f"lora_unet_x.{key}": one for key, one in custom.items()}
    modules, unknown = grouped(given(state), set())
    assert unknown == []
    parts = dict(modules["lora_unet_x"])
    alpha = parts.pop("alpha", None)
    return Change(parts, None if alpha is None else float(alpha))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@torch.no_grad()
def test_every_kind_as_lycoris_merges_it(algorithm, layer):
    for rank in (1, 4):
        torch.manual_seed(rank)
        plain = LAYERS[layer]()
        module = trained(plain, algorithm, rank)
        expected, bias = merged_by(module, plain.weight, 1.0)
        change = change_of(module)
        merged = plain.weight + weight_change(change, plain.weight, 1.0)
        torch.testing.assert_close(merged, expected.reshape(merged.shape), atol=1e-6, rtol=1e-5)
        if bias is not None and bias_change(change, 1.0) is not None:
            torch.testing.assert_close(plain.bias + bias_change(change, 1.0), bias, atol=1e-6, rtol=1e-5)
        if "dora" not in algorithm and "rescaled" not in algorithm:
            for strength in (-0.7, 2.5):
                other, _ = merged_by(module, plain.weight, strength)
                merged = plain.weight + weight_change(change, plain.weight, strength)
                torch.testing.assert_close(merged, other.reshape(merged.shape), atol=2e-6, rtol=1e-5)
