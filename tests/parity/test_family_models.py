"""The networks of Stable Diffusion XL and of the other relatives against the reference's."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

import sfumato
from sfumato.models.attention import Context
from sfumato.models.packed import pack, packable
from sfumato.runtime.choices import count_parameters
from support.checkpoints import PRUNED, REFINER, TEXT, TEXT_2, UNET, VAE, XL, randomize
from support.compare import FLOAT32, distance, generator
from support.families import (
    LATENT_UPSCALER,
    PLAYGROUND_VAE,
    REAL_ENCODERS,
    REAL_UNETS,
    SHALLOW,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def unets(**config) -> tuple[sfumato.UNet2DConditionModel, diffusers.UNet2DConditionModel]:
    theirs = randomize(diffusers.UNet2DConditionModel(**config))
    ours = sfumato.UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def told(config, batch: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """Pooled prompts and sizes, as many as the config wants."""
    pooled = TEXT_2["projection_dim"]
    count = (config["projection_class_embeddings_input_dim"] - pooled) // config["addition_time_embed_dim"]
    ids = torch.randint(0, 1200, (batch, count), generator=generator(seed)).float()
    return {"text_embeds": randn(batch, pooled, seed=seed), "time_ids": ids}


SIZED = {
    "base": XL,
    "refiner": REFINER,
    "pruned": PRUNED,
    "shallow": SHALLOW,
    "nine channels": XL | {"in_channels": 9},
    "distilled guidance": XL | {"time_cond_proj_dim": 12},
    "sine first": XL | {"flip_sin_to_cos": False, "freq_shift": 1},
    "nested middle": XL | {"transformer_layers_per_block": [1, [2, 1]], "reverse_transformer_layers_per_block": [[1, 2, 3], 1]},
    "depths that no layer reads": XL | {"transformer_layers_per_block": [[3], 2], "reverse_transformer_layers_per_block": [2, [3, 4]]},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_unets_that_read_pooled_prompts_and_sizes(name):
    config = SIZED[name]
    ours, theirs = unets(**config)
    condition = {"timestep_cond": randn(2, 12, seed=4)} if "time_cond_proj_dim" in config else {}
    for size in ((8, 8), (9, 14)):
        x, context = randn(2, config.get("in_channels", 4), *size), randn(2, 7, config["cross_attention_dim"], seed=1)
        options = {"added_cond_kwargs": told(config), **condition}
        a, b = (model(x, 601, context, **options).sample for model in (ours, theirs))
        assert distance(a, b) < FLOAT32
    others = {"added_cond_kwargs": told(config, seed=6), **condition}
    assert distance(ours(x, 601, context, **others).sample, a) > 10 * FLOAT32


@torch.no_grad()
def test_one_picture_for_several_prompts_and_their_sizes():
    """The halves of guidance differ in time, too: pooled prompts are part of it."""
    ours, theirs = unets(**XL)
    x, states, added = randn(2, 4, 8, 8), randn(4, 7, XL["cross_attention_dim"], seed=1), told(XL, 4)
    both = theirs(torch.cat([x, x]), 601, states, added_cond_kwargs=added).sample
    assert distance(ours(x, 601, states, added_cond_kwargs=added).sample, both) < FLOAT32
    context = Context(states)
    ours.read(context)
    moment = ours.moment(x, 601.0, added_cond_kwargs=added)
    assert distance(ours(x, moment, context).sample, both) < FLOAT32


def test_pooled_prompts_and_sizes_that_are_missing_or_do_not_fit_are_refused():
    model, x, states = sfumato.UNet2DConditionModel(**XL), randn(1, 4, 8, 8), randn(1, 7, XL["cross_attention_dim"])
    with pytest.raises(ValueError, match="requires text_embeds"):
        model(x, 1, states)
    with pytest.raises(ValueError, match="requires time_ids"):
        model(x, 1, states, added_cond_kwargs={"text_embeds": randn(1, 40)})
    with pytest.raises(ValueError, match=r"text_embeds of 40 numbers and 5 time_ids make 80, but this U-Net takes 88"):
        model(x, 1, states, added_cond_kwargs={"text_embeds": randn(1, 40), "time_ids": randn(1, 5)})


@torch.no_grad()
def test_the_latent_upscaler():
    ours, theirs = unets(**LATENT_UPSCALER)
    x, states, condition = randn(2, 8, 16, 24), randn(2, 7, 24, seed=1), randn(2, 40, seed=2)
    for level in (0.3, torch.tensor(-1.7)):
        a, b = (model(x, level, states, timestep_cond=condition).sample for model in (ours, theirs))
        assert distance(a, b) < FLOAT32
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    a, b = (model(x, 0.3, states, timestep_cond=condition, encoder_attention_mask=mask).sample for model in (ours, theirs))  # fmt: skip
    assert distance(a, b) < FLOAT32
    # One picture for several prompts: what is pooled of them is part of time here, too.
    a = ours(x[:1], 0.3, states, timestep_cond=condition).sample
    b = theirs(x[:1].repeat(2, 1, 1, 1), 0.3, states, timestep_cond=condition).sample
    assert distance(a, b) < FLOAT32
    context = Context(states)
    ours.read(context)
    assert distance(ours(x[:1], ours.moment(x[:1], 0.3, timestep_cond=condition), context).sample, b) < FLOAT32


def test_the_first_name_of_the_second_activation_is_read():
    config = LATENT_UPSCALER | {"timestep_act_2": "gelu"}
    del config["timestep_post_act"]
    assert sfumato.UNet2DConditionModel.from_config(config).config.timestep_post_act == "gelu"


@torch.no_grad()
def test_layers_packed_for_a_processor_give_the_same():
    if not packable(torch.float32):
        pytest.skip("this build of torch has no oneDNN")
    for config in (XL, LATENT_UPSCALER):
        model = randomize(sfumato.UNet2DConditionModel(**config))
        x, states = randn(2, config.get("in_channels", 4), 16, 16), randn(2, 7, config["cross_attention_dim"], seed=1)
        options = {"timestep_cond": randn(2, 40)} if config is LATENT_UPSCALER else {"added_cond_kwargs": told(config)}
        plain = model(x, 3, states, **options).sample
        pack(model, None)
        assert distance(model(x, 3, states, **options).sample, plain) < FLOAT32


@pytest.mark.parametrize("name", REAL_UNETS)
def test_parameters_of_the_real_unets(name):
    with torch.device("meta"):
        ours, theirs = sfumato.UNet2DConditionModel(**REAL_UNETS[name]), diffusers.UNet2DConditionModel(**REAL_UNETS[name])  # fmt: skip
    wanted = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == wanted
    assert count_parameters(ours.config) == sum(shape.numel() for shape in wanted.values())


def load_text(ours, theirs) -> None:
    state = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in theirs.state_dict().items()}  # fmt: skip
    ours.load_state_dict({key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=True)


@pytest.mark.parametrize("eos", [2, 599])
@torch.no_grad()
def test_text_encoder_with_projection(eos):
    config = TEXT_2 | {"eos_token_id": eos, "projection_dim": 12}
    theirs = randomize(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)))
    ours = sfumato.CLIPTextModelWithProjection(**config).eval()
    load_text(ours, theirs)
    ids = torch.randint(3, 590, (3, 20), generator=generator())
    ids[:, 0], ids[0, 5:], ids[1, 11:], ids[2, 19:] = 598, 599, 599, 599
    a, b = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert a.text_embeds.shape == (3, 12)
    assert distance(a.text_embeds, b.text_embeds) < FLOAT32
    assert distance(a.last_hidden_state, b.last_hidden_state) < FLOAT32
    assert distance(a.hidden_states[-2], b.hidden_states[-2]) < FLOAT32
    assert torch.equal(a[0], a.text_embeds)
    for flag in (True, False):
        values = ours(ids, output_hidden_states=flag, return_dict=False)
        assert torch.equal(values[0], a.text_embeds)
        assert len(values) == 2 + flag


def test_a_text_encoder_with_projection_is_written_and_read(tmp_path):
    ours = randomize(sfumato.CLIPTextModelWithProjection(**TEXT_2))
    ours.save_pretrained(tmp_path)
    theirs, loading = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)  # fmt: skip
    assert not loading["missing_keys"]
    again = sfumato.CLIPTextModelWithProjection.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    ids = torch.tensor([[598, 4, 5, 599]])
    with torch.no_grad():
        assert distance(ours(ids).text_embeds, theirs(ids).text_embeds) < FLOAT32


@pytest.mark.parametrize("name", REAL_ENCODERS)
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_parameters_of_the_real_text_encoders(name, kind):
    with torch.device("meta"):
        ours = getattr(sfumato, kind)(**REAL_ENCODERS[name])
        theirs = getattr(transformers, kind)(transformers.CLIPTextConfig(**REAL_ENCODERS[name]))
    wanted = {key.removeprefix("text_model."): value.shape for key, value in theirs.state_dict().items()}
    assert {key.removeprefix("text_model."): value.shape for key, value in ours.state_dict().items()} == wanted


@torch.no_grad()
def test_latents_centred_and_scaled_by_channel():
    """The reference has the formula in its pipelines only."""
    vae = randomize(sfumato.AutoencoderKL(**VAE, **PLAYGROUND_VAE))
    z = randn(2, 4, 6, 11)
    mean, std = (torch.tensor(PLAYGROUND_VAE[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    assert distance(vae.unscaled(z), z * std / 0.5 + mean) < 1e-6
    assert distance(vae.scaled(vae.unscaled(z)), z) < 1e-5
    plain = randomize(sfumato.AutoencoderKL(**VAE, scaling_factor=0.13025, shift_factor=0.1))
    assert torch.equal(plain.unscaled(z), z / 0.13025 + 0.1)
    assert torch.equal(plain.scaled(z), (z - 0.1) * 0.13025)


def test_configs_of_one_family_are_read_key_by_key_as_the_reference_reads_them():
    """What is missing takes the reference's defaults, what is null is no; keys of training are left alone."""
    for name, values in REAL_UNETS.items():
        with torch.device("meta"):
            theirs = diffusers.UNet2DConditionModel(**values)
            ours = sfumato.UNet2DConditionModel.from_config(
                values | {"decay": 0.9999, "optimization_step": 1, "class_embeddings_concat": False}
            )
        for key, value in theirs.config.items():
            if key[0] != "_" and key in ours.config:
                assert list_of(ours.config[key]) == list_of(value) or (value is None and ours.config[key] is False), (
                    name,
                    key,
                )


def list_of(value):
    return [list_of(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_unets_of_a_kind_are_told_apart_from_those_of_another():
    with pytest.raises(ValueError, match="reverse_transformer_layers_per_block"):
        sfumato.UNet2DConditionModel(**XL | {"transformer_layers_per_block": [1, [2, 1]]})
    with pytest.raises(ValueError, match="one entry for each layer"):
        sfumato.UNet2DConditionModel(**PRUNED | {"transformer_layers_per_block": [1, [2, 1, 1]]})
    with pytest.raises(ValueError, match="multiples of 32"):
        sfumato.UNet2DConditionModel(**LATENT_UPSCALER | {"block_out_channels": [32, 48, 64, 64]})
    with pytest.raises(ValueError, match="norm_num_groups"):
        sfumato.UNet2DConditionModel(**UNET | {"norm_num_groups": None})
    with pytest.raises(ValueError, match="addition_time_embed_dim"):
        sfumato.UNet2DConditionModel(**XL | {"addition_time_embed_dim": None})
    with pytest.raises(ValueError, match="latents_std"):
        sfumato.AutoencoderKL(**VAE, latents_mean=[0.0, 0.0, 0.0, 0.0])
    assert sfumato.CLIPTextModelWithProjection(**TEXT).config.projection_dim == TEXT["projection_dim"]
