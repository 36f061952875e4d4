"""The networks of Stable Diffusion 1.5 at their real size, once: a shape that only exists there must not surprise."""

from __future__ import annotations

import gc

import diffusers
import pytest
import torch
import transformers

import sfumato
from support.checkpoints import FULL_SIZE_UNET
from support.compare import FLOAT32, distance, generator

VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UNet2DConditionModel", FULL_SIZE_UNET),
        (
            "UNet2DConditionModel",
            FULL_SIZE_UNET | {"use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]},
        ),
        ("AutoencoderKL", VAE),
        ("AutoencoderTiny", {}),
        ("CLIPTextModel", CLIP),
    ],
)
def test_every_key_stands_where_the_reference_has_it(name, config):
    with torch.device("meta"):
        ours = getattr(sfumato, name)(**config)
        if name == "CLIPTextModel":
            theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        else:
            theirs = getattr(diffusers, name)(**config)
    for mine, other in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
    ):
        shapes = [
            [(key.removeprefix("text_model."), value.shape) for key, value in each.items()] for each in (mine, other)
        ]
        assert shapes[0] == shapes[1]


def shared(ours_class, theirs_class, config, prefix: str = ""):
    """The same random weights in both libraries, held once: neither side allocates its own."""
    with torch.device("meta"):
        ours = ours_class(**config)
        theirs = theirs_class(transformers.CLIPTextConfig(**config)) if prefix else theirs_class(**config)
    draw = generator(0)
    state = {}
    for name, value in ours.state_dict().items():
        # Uniform numbers of unit variance: three times as fast to draw as normal ones, and as good.
        noise = torch.empty(value.shape).uniform_(-(3**0.5), 3**0.5, generator=draw)
        if value.ndim > 1:
            state[name] = noise.div_(value[0].numel() ** 0.5)
        else:
            state[name] = noise.mul_(0.1).add_("norm" in name and name.endswith("weight"))
    ours.load_state_dict(state, strict=True, assign=True)
    strip = bool(prefix) and not any(key.startswith(prefix) for key in theirs.state_dict())
    renamed = {key.removeprefix(prefix) if strip else key: value for key, value in state.items()}
    missing, surplus = theirs.load_state_dict(renamed, strict=False, assign=True)
    assert not surplus
    assert all("position_ids" in key for key in missing)
    for name, buffer in theirs.named_buffers():
        if "position_ids" in name:
            owner = theirs.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1])[None]
    return ours.eval(), theirs.eval()


@pytest.fixture(autouse=True)
def _free():
    yield
    gc.collect()


@pytest.mark.long
@torch.no_grad()
def test_unet():
    ours, theirs = shared(sfumato.UNet2DConditionModel, diffusers.UNet2DConditionModel, FULL_SIZE_UNET)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    x, context = torch.randn(1, 4, 16, 24, generator=generator(1)), torch.randn(1, 77, 768, generator=generator(2))
    a = ours(x, 541, context, return_dict=False)[0]
    b = theirs(x, 541, context, return_dict=False)[0]
    assert distance(a, b) < FLOAT32


@torch.no_grad()
def test_autoencoder():
    ours, theirs = shared(sfumato.AutoencoderKL, diffusers.AutoencoderKL, VAE)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    x, z = torch.randn(1, 3, 64, 96, generator=generator(1)), torch.randn(1, 4, 8, 12, generator=generator(2))
    assert distance(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) < FLOAT32
    assert distance(ours.decode(z).sample, theirs.decode(z).sample) < FLOAT32


@torch.no_grad()
def test_text_encoder():
    ours, theirs = shared(sfumato.CLIPTextModel, transformers.CLIPTextModel, CLIP, "text_model.")
    assert sum(p.numel() for p in ours.parameters()) == 123_060_480
    ids = torch.randint(0, 49406, (2, 77), generator=generator(1))
    ids[:, 0], ids[0, 9:], ids[1, 76] = 49406, 49407, 49407
    assert distance(ours(ids).last_hidden_state, theirs(ids).last_hidden_state) < FLOAT32
    assert distance(ours(ids).pooler_output, theirs(ids).pooler_output) < FLOAT32
