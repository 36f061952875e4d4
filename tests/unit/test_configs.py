"""Configurations: what is read, what is refused, and that a round trip loses nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import AutoencoderKL, UNet2DConditionModel
from sfumato.configs import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNet2DConditionConfig,
    parse,
)
from sfumato.errors import ConfigError, UnknownArgument

CLASSES = (CLIPTextConfig, UNet2DConditionConfig, AutoencoderKLConfig, AutoencoderTinyConfig)


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_survive_json(cls):
    config = cls()
    again, unknown = parse(cls, json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert unknown == []
    assert hash(again.__class__) == hash(cls)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3), max_leaves=5)  # fmt: skip


@given(extra=st.dictionaries(st.text(min_size=1).filter(lambda key: not key.startswith("_")), json_values, max_size=5))
def test_unknown_keys_are_kept_and_named(extra):
    known = {f.name for f in dataclasses.fields(AutoencoderKLConfig)}
    extra = {key: value for key, value in extra.items() if key not in known}
    config, unknown = parse(AutoencoderKLConfig, {"latent_channels": 7, **extra})
    assert config.latent_channels == 7
    assert sorted(unknown) == sorted(extra)
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(config.to_dict() | extra))


def test_bookkeeping_is_not_unknown():
    config, unknown = parse(CLIPTextConfig, {"_name_or_path": "x", "transformers_version": "5", "dropout": 0.1})
    assert unknown == []
    assert config["_name_or_path"] == "x"


def test_a_config_reads_like_the_mapping_it_came_from():
    config, _ = parse(UNet2DConditionConfig, {"sample_size": [8, 9], "other": 3})
    assert config["sample_size"] == [8, 9]
    assert config.sample_size == (8, 9)
    assert config.other == config["other"] == config.get("other") == 3
    assert "other" in config
    assert "nothing" not in config
    assert config.get("nothing", 5) == 5
    assert dict(config.items()) == config.to_dict()
    assert len(list(config)) == len(config) == len(config.keys())
    with pytest.raises(AttributeError, match="nothing"):
        _ = config.nothing
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sample_size = 3


REFUSED = {
    UNet2DConditionConfig: [
        {"down_block_types": ["AttnDownBlock2D"] * 4},
        {"up_block_types": ["SkipUpBlock2D"] * 4},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ["KDownBlock2D"] * 3 + ["DownBlock2D"], "mid_block_type": None},
        {
            "mid_block_type": "UNetMidBlock2D",
            "down_block_types": ["KDownBlock2D"] * 4,
            "up_block_types": ["KUpBlock2D"] * 4,
        },
        {"act_fn": "snake"},
        {"resnet_time_scale_shift": "ada_group"},
        {"class_embed_type": "other"},
        {"class_embed_type": "projection"},
        {"addition_embed_type": "text_time"},
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 88},
        {"addition_embed_type": "text_image"},
        {"encoder_hid_dim": 3},
        {"encoder_hid_dim_type": "text_proj"},
        {"dual_cross_attention": True},
        {"time_embedding_type": "learned"},
        {"time_embedding_act_fn": "silu"},
        {"timestep_post_act": "snake"},
        {"attention_type": "gated"},
        {"cross_attention_norm": "layer_norm"},
        {"resnet_skip_time_act": True},
        {"resnet_out_scale_factor": 2.0},
        {"reverse_transformer_layers_per_block": [1, 2, 3]},
        {"reverse_transformer_layers_per_block": [1, 2, 3, [1, 1]]},
        {"transformer_layers_per_block": [1, 1, 1, [1, 1]]},
        {"norm_num_groups": None},
        {"attention_head_dim": 0},
        {"attention_head_dim": [8, 8]},
        {"layers_per_block": [1, 2]},
        {"block_out_channels": [8, 8]},
        {"cross_attention_dim": [1, 2, 3]},
    ],
    CLIPTextConfig: [{"hidden_act": "relu"}, {"num_attention_heads": 7}],
    AutoencoderKLConfig: [
        {"down_block_types": ["AttnDownEncoderBlock2D"]},
        {"up_block_types": ["AttnUpDecoderBlock2D"]},
        {"act_fn": "snake"},
        {"latents_mean": [0.0]},
        {"latents_std": [1.0]},
        {"block_out_channels": [8, 8]},
    ],
    AutoencoderTinyConfig: [{"act_fn": "snake"}, {"upsample_fn": "bilinear"}, {"num_encoder_blocks": [1]}],
}


# Of the wrong type, out of bounds, or of a shape that no network has: each was once a crash, a hang or no memory left.
NONSENSE = {
    CLIPTextConfig: [
        {"hidden_size": "192"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": None},
        {"vocab_size": True},
        {"layer_norm_eps": "x"},
        {"layer_norm_eps": float("nan")},
        {"eos_token_id": 10**30},
        {"hidden_act": ["gelu"]},
    ],
    UNet2DConditionConfig: [
        {"block_out_channels": None},
        {"block_out_channels": []},
        {"block_out_channels": [0, 32, 32, 32]},
        {"block_out_channels": [2**30, 32, 32, 32]},
        {"block_out_channels": [33, 32, 32, 32]},
        {"block_out_channels": [32, 32, 32, "32"]},
        {"block_out_channels": [32] * 1000},
        {"layers_per_block": 10**8},
        {"layers_per_block": [64] * 4},
        {"transformer_layers_per_block": 10**8},
        {"attention_head_dim": 7},
        {"norm_num_groups": 0},
        {"norm_num_groups": 31},
        {"sample_size": -1},
        {"sample_size": [64]},
        {"conv_in_kernel": 4},
        {"freq_shift": 160},
        {"down_block_types": "DownBlock2D"},
        {"act_fn": {"a": 1}},
        {"upcast_attention": "yes"},
        {"dropout": 2},
    ],
    AutoencoderKLConfig: [
        {"scaling_factor": "x"},
        {"scaling_factor": 0},
        {"layers_per_block": 10**8},
        {"latent_channels": 1.5},
        {"norm_num_groups": 31},
        {"sample_size": []},
    ],
    AutoencoderTinyConfig: [
        {"num_decoder_blocks": [3, 3, 3, 10**8]},
        {"upsampling_scaling_factor": 0},
        {"latent_magnitude": None},
    ],
}


@pytest.mark.parametrize(("cls", "values"), [(cls, values) for cls, cases in NONSENSE.items() for values in cases])
def test_a_value_that_no_model_has_is_an_error_at_once(cls, values, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError) as caught:
        parse(cls, values, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert next(iter(values)) in message
    assert "\n" not in message
    assert len(message) < 500


def test_null_is_off():
    """As it is to the ecosystem, whose configs say null here and there."""
    config, _ = parse(UNet2DConditionConfig, {"upcast_attention": None, "dual_cross_attention": None})
    assert config.upcast_attention is False
    assert config.dual_cross_attention is False


@pytest.mark.parametrize(("cls", "values"), [(cls, values) for cls, cases in REFUSED.items() for values in cases])
def test_a_value_we_do_not_support_is_an_error_that_names_file_and_key(cls, values):
    with pytest.raises(ConfigError) as caught:
        parse(cls, values)
    message = str(caught.value)
    assert "config.json" in message
    assert next(iter(values)) in message
    assert "\n" not in message


def test_a_surplus_key_given_in_code_is_an_error_with_a_suggestion():
    with pytest.raises(UnknownArgument, match=r"'latent_chanels'.*did you mean 'latent_channels'"):
        AutoencoderKL(latent_chanels=4)
    with pytest.raises(UnknownArgument, match="not both"):
        UNet2DConditionModel(UNet2DConditionConfig(), in_channels=4)


def test_a_surplus_key_in_a_file_is_reported_once(caplog):
    from support.checkpoints import VAE

    AutoencoderKL.from_config(VAE | {"zebra": 1, "_hidden": 2})
    assert [record.getMessage() for record in caplog.records] == ["AutoencoderKL: config keys without effect: zebra"]


def test_heads_may_be_named_rightly():
    config, _ = parse(UNet2DConditionConfig, {"num_attention_heads": [1, 2, 4, 4], "attention_head_dim": 8})
    assert config.heads == (1, 2, 4, 4)
    assert UNet2DConditionConfig().heads == (8, 8, 8, 8)
