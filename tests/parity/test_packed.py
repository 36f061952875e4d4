"""Packed networks with our own kernels against the reference's, in float32."""

from __future__ import annotations

import gc

import diffusers
import pytest
import torch
import transformers

import sfumato
from sfumato.kernels import build, kernels_for
from sfumato.models.base import Model
from sfumato.models.packed import Packed, PackedGEGLU, PackedGroupNorm, kernel_attention, pack, packable
from support.checkpoints import FULL_SIZE_UNET, SHAPES, TEXT, UNET, VAE, randomize
from support.compare import FLOAT32, distance, generator

pytestmark = [
    pytest.mark.skipif(not packable(torch.float32), reason="this build of torch has no oneDNN"),
    pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler"),
]

WIDE = UNET | {"block_out_channels": [16, 32, 32, 48]}
UNETS = {
    "Stable Diffusion 1.5": WIDE,
    "Stable Diffusion 2.1": SHAPES["sd21"].unet | {"block_out_channels": [16, 32, 32, 64]},
    "odd": SHAPES["odd"].unet,
    "scale and shift": WIDE | {"resnet_time_scale_shift": "scale_shift"},
    "mish": WIDE | {"act_fn": "mish"},
    "pad right only": WIDE | {"downsample_padding": 0},
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def packed(model: Model) -> Model:
    """The model with every layer packed, and attention by our kernel."""
    kernels = kernels_for(torch.float32)
    pack(model, kernels)
    model.set_attention(kernel_attention(kernels))
    assert any(isinstance(module, Packed) for module in model.modules())
    return model


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet(name: str):
    theirs = randomize(diffusers.UNet2DConditionModel(**UNETS[name]))
    ours = sfumato.UNet2DConditionModel(**UNETS[name]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    packed(ours)
    for size in ((16, 16), (9, 14)):
        x, context = randn(2, 4, *size), randn(2, 7, 24, seed=1)
        want = theirs(x, 37, context, return_dict=False)[0]
        for layout in (torch.contiguous_format, torch.channels_last):
            got = ours(x.contiguous(memory_format=layout), 37, context, return_dict=False)[0]
            assert distance(got, want) < FLOAT32


@torch.no_grad()
def test_masked_context():
    theirs = randomize(diffusers.UNet2DConditionModel(**WIDE))
    ours = sfumato.UNet2DConditionModel(**WIDE).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    packed(ours)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    inputs = (randn(2, 4, 16, 16), 5, randn(2, 7, 24))
    got, want = (model(*inputs, encoder_attention_mask=mask, return_dict=False)[0] for model in (ours, theirs))
    assert distance(got, want) < FLOAT32


@torch.no_grad()
def test_autoencoder():
    config = VAE | {"block_out_channels": [16, 32]}
    theirs = randomize(diffusers.AutoencoderKL(**config))
    ours = sfumato.AutoencoderKL(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    packed(ours)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, z = (y.contiguous(memory_format=layout) for y in (randn(2, 3, 24, 40), randn(2, 4, 12, 20)))
        assert distance(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) < FLOAT32
        assert distance(ours.decode(z).sample, theirs.decode(z).sample) < FLOAT32


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_text_encoder(masked: bool):
    theirs = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    ours = sfumato.CLIPTextModel(**TEXT).eval()
    state = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in theirs.state_dict().items()}  # fmt: skip
    ours.load_state_dict({key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=True)
    packed(ours)
    ids = torch.randint(3, 590, (2, 20), generator=generator())
    ids[:, 0], ids[0, 5:], ids[1, 19:] = 598, 599, 599
    mask = (torch.arange(20) < torch.tensor([6, 20])[:, None]).long() if masked else None
    got, want = ours(ids, mask).last_hidden_state, theirs(ids, mask).last_hidden_state
    kept = slice(None) if mask is None else mask.bool()
    assert distance(got[kept], want[kept]) < FLOAT32


@pytest.mark.long
@torch.no_grad()
def test_stable_diffusion_15_at_its_full_size():
    with torch.device("meta"):
        ours = sfumato.UNet2DConditionModel(**FULL_SIZE_UNET)
        theirs = diffusers.UNet2DConditionModel(**FULL_SIZE_UNET)
    draw = generator(0)
    state = {}
    for name, value in ours.state_dict().items():
        noise = torch.empty(value.shape).uniform_(-(3**0.5), 3**0.5, generator=draw)
        bias = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = noise.div_(value[0].numel() ** 0.5) if value.ndim > 1 else noise.mul_(0.1).add_(bias)
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True, assign=True)
        model.eval()
    del state
    x, context = randn(1, 4, 24, 40, seed=1), randn(1, 77, 768, seed=2)
    want = theirs(x, 541, context, return_dict=False)[0]
    del theirs
    gc.collect()
    packed(ours)
    kinds = {type(module) for module in ours.modules()}
    assert {PackedGroupNorm, PackedGEGLU} <= kinds
    got = ours(x.contiguous(memory_format=torch.channels_last), 541, context, return_dict=False)[0]
    assert distance(got, want) < FLOAT32
