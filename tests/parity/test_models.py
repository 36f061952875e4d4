"""Every network against the reference's, on random weights: text encoder, U-Net, both autoencoders."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import transformers

import sfumato
from support.checkpoints import SHAPES, TEXT, UNET, VAE, randomize
from support.compare import FLOAT32, distance, generator


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def unets(**config) -> tuple[sfumato.UNet2DConditionModel, diffusers.UNet2DConditionModel]:
    """The same U-Net twice; strict loading also says that the parameter names agree."""
    theirs = randomize(diffusers.UNet2DConditionModel(**config))
    ours = sfumato.UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
def both(models, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = models
    return ours(*args, **kwargs, return_dict=False)[0], theirs(*args, **kwargs, return_dict=False)[0]


UNETS = {
    **{name: shape.unet for name, shape in SHAPES.items()},
    "layers per block": UNET | {"layers_per_block": [1, 2, 3, 1]},
    "transformer layers": UNET | {"transformer_layers_per_block": 2},
    "transformer layers per block": UNET | {"transformer_layers_per_block": [1, 2, 1, 3]},
    "scale and shift": UNET | {"resnet_time_scale_shift": "scale_shift"},
    "no middle": UNET | {"mid_block_type": None},
    "middle scale": UNET | {"mid_block_scale_factor": 1.5},
    "gelu": UNET | {"act_fn": "gelu"},
    "mish": UNET | {"act_fn": "mish"},
    "relu": UNET | {"act_fn": "relu"},
    "centred": UNET | {"center_input_sample": True},
    "sine first": UNET | {"flip_sin_to_cos": False, "freq_shift": 1},
    "kernels": UNET | {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "time width": UNET | {"time_embedding_dim": 48},
    "pad right only": UNET | {"downsample_padding": 0},
    "all only cross": UNET | {"only_cross_attention": True},
    "some only cross": UNET | {"only_cross_attention": [True, True, False, True]},
    "middle only cross": UNET | {"only_cross_attention": [True, True, True, False], "mid_block_only_cross_attention": True},
    "middle not cross": UNET | {"only_cross_attention": True, "mid_block_only_cross_attention": False},
    "nine channels": UNET | {"in_channels": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str):
    config = UNETS[name]
    models = unets(**config)
    for size in ((8, 8), (9, 14)):  # and one that is odd at some level, where upsampling must find the way back
        x, context = randn(2, config.get("in_channels", 4), *size), randn(2, 7, 24, seed=1)
        ours, theirs = both(models, x, 37, context)
        assert distance(ours, theirs) < FLOAT32


def test_timesteps_of_every_kind():
    models = unets(**UNET)
    x, context = randn(2, 4, 8, 8), randn(2, 7, 24)
    tensors = (torch.tensor(981), torch.tensor([3, 700]), torch.tensor(381.28125, dtype=torch.float64))
    for timestep in (0, 999, 412.75, *tensors):
        ours, theirs = both(models, x, timestep, context)
        assert distance(ours, theirs) < FLOAT32


CLASSES = {
    "timestep": ({"class_embed_type": "timestep"}, torch.tensor([3, 9])),
    "identity": ({"class_embed_type": "identity"}, randn(2, 64, seed=5)),
    "projection": ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5}, randn(2, 5, seed=5)),
    "simple projection": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 5},
        randn(2, 5, seed=5),
    ),
    "table": ({"num_class_embeds": 10}, torch.tensor([3, 9])),
}


@pytest.mark.parametrize("concat", [False, True], ids=["added", "concatenated"])
@pytest.mark.parametrize("name", CLASSES)
def test_class_embeddings(name: str, concat: bool):
    config, labels = CLASSES[name]
    models = unets(**UNET, **config, class_embeddings_concat=concat)
    x, context = randn(2, 4, 8, 8), randn(2, 7, 24)
    ours, theirs = both(models, x, 5, context, class_labels=labels)
    assert distance(ours, theirs) < FLOAT32
    other, _ = both(models, x, 5, context, class_labels=labels.flip(0))
    assert distance(ours, other) > 10 * FLOAT32


def test_a_class_embedding_without_labels_is_refused():
    model = sfumato.UNet2DConditionModel(**UNET, num_class_embeds=3)
    with pytest.raises(ValueError, match="class_labels"):
        model(randn(1, 4, 8, 8), 1, randn(1, 7, 24))


def test_guidance_condition():
    models = unets(**UNET, time_cond_proj_dim=12)
    condition = randn(2, 12, seed=4)
    x, context = randn(2, 4, 8, 8), randn(2, 7, 24)
    ours, theirs = both(models, x, 5, context, timestep_cond=condition)
    assert distance(ours, theirs) < FLOAT32
    assert distance(ours, both(models, x, 5, context)[0]) > 10 * FLOAT32


def test_masked_context():
    models = unets(**UNET)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    x, context = randn(2, 4, 8, 8), randn(2, 7, 24)
    ours, theirs = both(models, x, 5, context, encoder_attention_mask=mask)
    assert distance(ours, theirs) < FLOAT32
    changed = context.clone()
    changed[0, 3:] = 9
    assert torch.allclose(both(models, x, 5, changed, encoder_attention_mask=mask)[0][0], ours[0], atol=1e-5)


@pytest.mark.parametrize(
    "config", [TEXT, SHAPES["sd21"].text, TEXT | {"eos_token_id": 2}], ids=["quick", "gelu", "old"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_text_encoder(config, masked: bool):
    theirs = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    ours = sfumato.CLIPTextModel(**config).eval()
    state = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in theirs.state_dict().items()}  # fmt: skip
    ours.load_state_dict({key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=True)
    ids = torch.randint(3, 590, (3, 20), generator=generator())
    ids[:, 0], ids[0, 5:], ids[1, 11:], ids[2, 19:] = 598, 599, 599, 599
    mask = (torch.arange(20) < torch.tensor([6, 12, 20])[:, None]).long() if masked else None
    with torch.no_grad():
        a = ours(ids, mask, output_hidden_states=True)
        b = theirs(ids, mask, output_hidden_states=True)
    assert distance(a.last_hidden_state, b.last_hidden_state) < FLOAT32
    assert distance(a.pooler_output, b.pooler_output) < FLOAT32
    assert len(a.hidden_states) == len(b.hidden_states)
    for mine, other in zip(a.hidden_states[:-1], b.hidden_states[:-1], strict=True):
        assert distance(mine, other) < FLOAT32


VAES = {
    **{name: shape.vae for name, shape in SHAPES.items()},
    "one level": VAE | {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]},
    "no middle attention": VAE | {"mid_block_add_attention": False},
    "no quant convs": VAE | {"use_quant_conv": False, "use_post_quant_conv": False},
    "sixteen channels": VAE | {"latent_channels": 16, "layers_per_block": 2},
    "relu": VAE | {"act_fn": "relu"},
}  # fmt: skip


def vaes(**config) -> tuple[sfumato.AutoencoderKL, diffusers.AutoencoderKL]:
    theirs = randomize(diffusers.AutoencoderKL(**config))
    ours = sfumato.AutoencoderKL(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_autoencoder(name: str):
    ours, theirs = vaes(**VAES[name])
    x = randn(2, 3, 24, 40)
    a, b = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    assert distance(a.mean, b.mean) < FLOAT32
    assert distance(a.std, b.std) < FLOAT32
    assert distance(a.sample(generator(3)), b.sample(generator(3))) < FLOAT32
    assert torch.equal(a.mode(), a.mean)
    z = randn(2, VAES[name].get("latent_channels", 4), 6, 11)
    assert distance(ours.decode(z).sample, theirs.decode(z).sample) < FLOAT32
    assert distance(ours(x).sample, theirs(x).sample) < FLOAT32


@torch.no_grad()
def test_autoencoders_as_one_call():
    x = randn(2, 3, 24, 40)
    ours, theirs = vaes(**VAE)
    for call in ({}, {"sample_posterior": True}):
        for seeds in (3, [3, 4]):
            a, b = (
                [generator(seed) for seed in seeds] if isinstance(seeds, list) else generator(seeds) for _ in range(2)
            )
            assert distance(ours(x, **call, generator=a).sample, theirs(x, **call, generator=b).sample) < FLOAT32
            pairs = zip(a, b, strict=True) if isinstance(seeds, list) else [(a, b)]
            assert all(torch.equal(mine.get_state(), other.get_state()) for mine, other in pairs)
    assert isinstance(ours(x, True, False, generator()), tuple)
    assert distance(ours(x, True, False, generator())[0], theirs(x, True, False, generator())[0]) < FLOAT32
    mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    assert distance(mine.kl(), other.kl()) < FLOAT32
    assert distance(mine.nll(mine.mean + 0.1), other.nll(other.mean + 0.1)) < FLOAT32
    shifted = [type(each)(each.parameters + 0.5) for each in (mine, other)]
    assert distance(mine.kl(shifted[0]), other.kl(shifted[1])) < FLOAT32

    theirs = randomize(diffusers.AutoencoderTiny(**TINY))
    ours = sfumato.AutoencoderTiny(**TINY).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert distance(ours(x).sample, theirs(x).sample) < FLOAT32
    assert distance(ours(x, False)[0], theirs(x, False)[0]) < FLOAT32
    half = ours.to(torch.bfloat16)(x.bfloat16()).sample  # the reference cannot: a byte over 255 is float32
    assert half.dtype == torch.bfloat16


FRESH = {
    "UNet2DConditionModel": [
        *UNETS.values(),
        *({**UNET, "class_embed_type": kind, "projection_class_embeddings_input_dim": 24} for kind in ("timestep", "projection", "simple_projection")),
        {**UNET, "num_class_embeds": 5, "time_cond_proj_dim": 16, "use_linear_projection": True},
    ],
    "AutoencoderKL": list(VAES.values()),
    "AutoencoderTiny": [{}, {"act_fn": "gelu", "latent_channels": 16}],
    "CLIPTextModel": [TEXT, SHAPES["sd21"].text],
}  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
def test_a_seed_gives_the_fresh_weights_of_the_reference_in_its_order(name: str):
    """So that a training begins where it would there, and its optimizer's state, which goes by position, fits."""

    def make(library, config):
        text = library is transformers
        torch.manual_seed(5)
        model = getattr(library, name)(
            *([transformers.CLIPTextConfig(**config)] if text else []), **({} if text else config)
        )
        return model, torch.get_rng_state()

    def bare(names):
        return [name.removeprefix("text_model.") for name in names]

    for config in FRESH[name]:
        (ours, state), (theirs, other) = (
            make(sfumato, config),
            make(transformers if name[:4] == "CLIP" else diffusers, config),
        )
        assert torch.equal(state, other)
        assert bare(ours.state_dict()) == bare(theirs.state_dict())
        parameters = list(ours.named_parameters()), list(theirs.named_parameters())
        for (mine_name, mine), (other_name, other) in zip(*parameters, strict=True):
            assert bare([mine_name]) == bare([other_name])
            assert torch.equal(mine, other), mine_name


def test_an_optimizer_s_state_of_the_reference_goes_on_here():
    ours, theirs = unets(**UNET)
    x, context = randn(1, 4, 8, 8), randn(1, 7, 24, seed=1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in (ours, theirs)]

    def train(model, optimizer):
        optimizer.zero_grad()
        model(x, 3, context, return_dict=False)[0].pow(2).mean().backward()
        optimizer.step()

    train(theirs, optimizers[1])
    ours.load_state_dict(theirs.state_dict())
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert distance(mine, other) < FLOAT32, name


@pytest.mark.parametrize("size", [(5, 9), (17, 23), (16, 30), (8, 8)])
@torch.no_grad()
def test_autoencoder_in_tiles_and_slices(size: tuple[int, int]):
    ours, theirs = vaes(**VAE)
    z = randn(2, 4, *size)
    x = randn(2, 3, 2 * size[0], 2 * size[1])
    whole = ours.decode(z).sample
    ours.enable_slicing()
    theirs.enable_slicing()
    assert distance(ours.decode(z).sample, whole) < FLOAT32 / 10  # the same numbers, but for rounding
    ours.enable_tiling()
    theirs.enable_tiling()
    assert distance(ours.decode(z).sample, theirs.decode(z).sample) < FLOAT32
    assert distance(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) < FLOAT32
    if max(size) > 8:
        assert distance(ours.decode(z).sample, whole) > FLOAT32  # tiles were really made
    ours.disable_tiling()
    ours.disable_slicing()
    assert torch.equal(ours.decode(z).sample, whole)


TINY = {
    "encoder_block_out_channels": [8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
}


@pytest.mark.parametrize("more", [{}, {"act_fn": "gelu"}, {"latent_channels": 16}], ids=["plain", "gelu", "sixteen"])
@torch.no_grad()
def test_tiny_autoencoder(more):
    theirs = randomize(diffusers.AutoencoderTiny(**TINY, **more))
    ours = sfumato.AutoencoderTiny(**TINY, **more).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, z = randn(2, 3, 24, 36), randn(2, more.get("latent_channels", 4), 6, 9)
    a = ours.encode(x).latents
    assert distance(a, theirs.encode(x).latents) < FLOAT32
    assert distance(ours.decode(z).sample, theirs.decode(z).sample) < FLOAT32
    assert distance(ours.scale_latents(a), theirs.scale_latents(a)) < FLOAT32
    assert distance(ours.unscale_latents(a), theirs.unscale_latents(a)) < FLOAT32
    whole = ours.decode(z).sample
    ours.enable_slicing()
    assert distance(ours.decode(z).sample, whole) < FLOAT32 / 10
    assert distance(ours.encode(x).latents, a) < FLOAT32 / 10
