"""Merged weights against the oracles: every kind against LyCORIS' own modules, every dialect against the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato import UNet2DConditionModel
from sfumato.adapters.adapter import grouped, read_adapter
from sfumato.adapters.files import given, read_stored
from sfumato.adapters.kinds import Change, bias_change, weight_change
from sfumato.adapters.names import BEGINNINGS
from sfumato.adapters.outfit import Worn, wear
from support.checkpoints import UNET, randomize

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


def stored_as(module: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a module as a file has them."""
    state = {key: one for key, one in module.state_dict().items() if "org" not in key}
    if type(module).__name__ == "FullModule":  # which has not taken the place of the layer yet
        state = {"diff": module.weight.data} | ({} if module.bias is None else {"diff_b": module.bias.data})
    else:
        custom = module.custom_state_dict()
        state = state if custom is None else custom
    return {f"{name}.{key}": one for key, one in state.items()}


def change_of(module: nn.Module) -> Change:
    modules, unknown = grouped(given(stored_as(module, "lora_unet_x")), set())
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


# A linear layer and a filter, which every file below changes both.
PLACES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1")
BEGUN = [one for one in BEGINNINGS["unet"] if not one.startswith("oft_")]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return randomize(UNet2DConditionModel(**UNET))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@torch.no_grad()
def test_every_kind_in_every_dialect(algorithm, unet):
    """Whatever its keys begin with, a kind gives the weights that LyCORIS' module gives; and none once it is off."""
    layers = [unet.get_submodule(place) for place in PLACES]
    own = {name: one.clone() for name, one in unet.state_dict().items()}
    modules = [trained(layer, algorithm, 2) for layer in layers]
    wanted = [merged_by(module, layer.weight, 1.0)[0] for module, layer in zip(modules, layers, strict=True)]
    for beginning in BEGUN:
        state = {}
        for place, module in zip(PLACES, modules, strict=True):
            state |= stored_as(module, beginning + (place.replace(".", "_") if beginning.endswith("_") else place))
        adapter = read_adapter(given(state), {"unet": unet})
        assert adapter.report.startswith("applied 2 of 2 (U-Net 2)"), beginning
        wear(unet, "unet", [Worn(adapter)])
        for layer, weight in zip(layers, wanted, strict=True):
            torch.testing.assert_close(layer.weight.data, weight.reshape(layer.weight.shape), atol=1e-6, rtol=1e-5)
        for nothing in ([Worn(adapter, 0.0)], []):
            wear(unet, "unet", nothing)
            assert all(torch.equal(one, own[name]) for name, one in unet.state_dict().items()), beginning


def _peft(kind: str) -> object:
    import peft

    layers = ["attn1.to_q", "attn1.to_k", "resnets.0.conv1"]
    return {
        "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 5}),
        "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers, use_rslora=True),
        "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers, use_dora=True),
        "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=layers),
        "LoHa, effective": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=layers, use_effective_conv2d=True),
        "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=layers),
        "LoKr, effective": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=layers, use_effective_conv2d=True, decompose_both=True),
        "LoKr, whole": lambda: peft.LoKrConfig(r=64, alpha=32, target_modules=layers[:2]),
        "(IA)3": lambda: peft.IA3Config(target_modules=layers[:2], feedforward_modules=["attn1.to_k"]),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["LoRA", "rsLoRA", "DoRA", "LoHa", "LoHa, effective", "LoKr", "LoKr, effective", "LoKr, whole", "(IA)3"]
)
@torch.no_grad()
def test_every_kind_as_peft_merges_and_saves_it(kind, tmp_path):
    """Its own folders, with the settings beside the weights."""
    peft = pytest.importorskip("peft")
    other, unet = (randomize(UNet2DConditionModel(**UNET)) for _ in range(2))
    model = peft.get_peft_model(other, _peft(kind))
    made = torch.Generator().manual_seed(0)
    for name, one in model.named_parameters():
        if one.requires_grad:
            one += 0.1 * torch.randn(one.shape, generator=made).abs()
            assert "base_layer" not in name
    model.save_pretrained(tmp_path)
    adapter = read_adapter(read_stored(tmp_path / "adapter_model.safetensors"), {"unet": unet})
    before = {name: one.clone() for name, one in unet.state_dict().items()}
    wear(unet, "unet", [Worn(adapter)])
    merged = model.merge_and_unload().state_dict()
    changed = 0
    for name, one in before.items():
        torch.testing.assert_close(unet.get_parameter(name).data, merged[name], atol=1e-6, rtol=1e-5, msg=name)
        changed += not torch.equal(unet.get_parameter(name).data, one)
    assert changed == adapter.total > 0
