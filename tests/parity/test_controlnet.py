"""ControlNets against the reference: the network, its files, and pictures down to the final latents."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.control_file import control_names
from sfumato.checkpoints.rules import original_name
from sfumato.errors import CheckpointError, ConfigError
from sfumato.models import ControlNetModel
from support.checkpoints import EVERY, FULL_SIZE_UNET, randomize
from support.compare import FLOAT32, distance, generator
from support.control import HINT, control_config, control_net

OPTIONS = {
    "as it is": ("sd15", {}),
    "blue first": ("sd15", {"controlnet_conditioning_channel_order": "bgr"}),
    "pooled": ("sd15", {"global_pool_conditions": True}),
    "linear projections, heads by block": ("sd21", {}),
    "levels of odd sizes": ("odd", {"conditioning_embedding_out_channels": (8, 8, 12)}),
    "XL": ("sdxl", {}),
    "no attention in the middle": ("sdxl", {"mid_block_type": "UNetMidBlock2D"}),
}


@pytest.mark.parametrize(("shape", "options"), OPTIONS.values(), ids=OPTIONS)
def test_residuals_and_what_the_unet_makes_of_them(shape, options, tmp_path):
    theirs = control_net(diffusers, shape, **options)
    theirs.save_pretrained(tmp_path)
    ours = ControlNetModel.from_pretrained(tmp_path)
    unets = [randomize(library.UNet2DConditionModel(**EVERY[shape].unet)) for library in (sfumato, diffusers)]
    height, width = (6, 10) if shape == "odd" else (8, 8)
    factor = 2 ** (len(theirs.config.conditioning_embedding_out_channels) - 1)
    x = torch.randn(2, 4, height, width, generator=generator(1))
    states = torch.randn(2, 5, EVERY[shape].unet["cross_attention_dim"], generator=generator(2))
    picture = torch.rand(2, 3, factor * height, factor * width, generator=generator(3))
    told = {"timestep": 321, "encoder_hidden_states": states}
    if shape == "sdxl":
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 40, generator=generator(4)), "time_ids": torch.ones(2, 6)}  # fmt: skip
    for guess in (False, True):
        call = told | {"controlnet_cond": picture, "conditioning_scale": 0.7, "guess_mode": guess}
        with torch.no_grad():
            mine, other = ours(x, **call), theirs(x, **call)
            assert distance(mine.mid_block_res_sample, other.mid_block_res_sample) < FLOAT32
            for one, two in zip(mine.down_block_res_samples, other.down_block_res_samples, strict=True):
                assert distance(one, two) < FLOAT32
            residuals = {"down_block_additional_residuals": other.down_block_res_samples, "mid_block_additional_residual": other.mid_block_res_sample}  # fmt: skip
            predicted = [unet(x, **told, **residuals).sample for unet in unets]
            plain = unets[0](x, **told).sample
        assert distance(*predicted) < FLOAT32
        assert distance(predicted[0], plain) > 0.01


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_halves_of_guidance_are_told_apart_where_the_prompt_is_read(shape):
    """One latent for two prompts gives what two equal ones do, with residuals as wide as they are or half as wide."""
    net, unet = control_net(sfumato, shape), randomize(sfumato.UNet2DConditionModel(**EVERY[shape].unet))
    x, picture = torch.randn(2, 4, 8, 8, generator=generator(1)), torch.rand(1, 3, 16, 16, generator=generator(3))
    states = torch.randn(4, 5, EVERY[shape].unet["cross_attention_dim"], generator=generator(2))
    more = {"added_cond_kwargs": {"text_embeds": torch.randn(4, 40, generator=generator(4)), "time_ids": torch.ones(4, 6)}} if shape == "sdxl" else {}  # fmt: skip

    def predict(sample):
        down, middle = net(sample, 5, states, picture, return_dict=False, **more)
        told = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(sample, 5, states, **told, **more).sample

    with torch.no_grad():
        assert distance(predict(x), predict(torch.cat([x, x]))) < FLOAT32


def test_saved_folders_are_the_references(tmp_path):
    ours = control_net(sfumato)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert ours.config["conditioning_embedding_out_channels"] == list(HINT)


def in_original_layout(net):
    table = control_names(net.config)
    return {original_name(key, table)[0]: value for key, value in net.state_dict().items()}


# Small, but with heads and groups as files have them.
FILES = {
    "sd15": {"attention_head_dim": 8, "block_out_channels": [32, 32, 64, 64]},
    "sd21": {
        "attention_head_dim": [1] * 4,
        "cross_attention_dim": 1024,
        "block_out_channels": [64] * 4,
        "upcast_attention": False,
    },
    "sdxl": {"attention_head_dim": [1, 1], "addition_time_embed_dim": 256, "block_out_channels": [32, 64]},
}


@pytest.mark.parametrize("shape", FILES)
@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("layout", ["original", "ours"])
def test_single_files_tell_their_config(shape, prefix, layout, tmp_path):
    net = control_net(sfumato, shape, norm_num_groups=32, **FILES[shape])
    tensors = in_original_layout(net) if layout == "original" else net.state_dict()
    more = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    save_file(
        {f"{prefix}{key}": value.contiguous() for key, value in tensors.items()} | more, tmp_path / "net.safetensors"
    )
    found = ControlNetModel.from_single_file(tmp_path / "net.safetensors")
    assert found.unet_config.per_block("layers_per_block") == net.unet_config.per_block("layers_per_block")
    depths = {"transformer_layers_per_block": 1}  # written once where they are equal
    assert found.config.replace(**depths) == net.config.replace(**depths)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())


def test_the_original_layout_is_what_the_reference_reads(tmp_path):
    net = control_net(sfumato, conditioning_embedding_out_channels=(16, 32, 96, 256))
    net.save_pretrained(tmp_path / "folder")
    save_file(in_original_layout(net), tmp_path / "net.safetensors")
    theirs = diffusers.ControlNetModel.from_single_file(str(tmp_path / "net.safetensors"), config=str(tmp_path / "folder"), local_files_only=True)  # fmt: skip
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in net.state_dict().items())


def test_the_one_of_stable_diffusion_1_5_at_its_full_size(tmp_path):
    """All 340 weights, as published, told from a header; none is made."""
    from sfumato.checkpoints.control_file import control_config as told
    from sfumato.checkpoints.headers import Stored
    from sfumato.checkpoints.weights import without_weights

    config = {key: value for key, value in FULL_SIZE_UNET.items() if key in ControlNetModel.config_class()}
    with without_weights():
        ours, theirs = ControlNetModel(**config), diffusers.ControlNetModel(**config)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert len(shapes) == 340
    assert sum(value.numel() for value in ours.state_dict().values()) == 361_279_120
    tensors = {original_name(key, control_names(ours.config))[0]: Stored("F16", shape) for key, shape in shapes.items()}
    found = told(tensors)
    assert found["conditioning_embedding_out_channels"] == (16, 32, 96, 256)
    assert all(getattr(ours.config, key, value) == value for key, value in found.items())


def test_files_that_are_something_else(tmp_path, checkpoints):
    files = {
        "a checkpoint": {"model.diffusion_model.output_blocks.0.0.in_layers.0.weight": torch.zeros(1)},
        "a LoRA": {"lora_unet_x.lora_down.weight": torch.zeros(1)},
        "an autoencoder (VAE)": {"decoder.conv_in.weight": torch.zeros(1)},
    }
    for kind, tensors in files.items():
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError) as error:
            ControlNetModel.from_single_file(tmp_path / "file.safetensors")
        assert f"is {kind}, not a ControlNet" in str(error.value)
    with pytest.raises(ConfigError, match="controlnet_conditioning_channel_order = 'brg' is not supported"):
        ControlNetModel(controlnet_conditioning_channel_order="brg")
    with pytest.raises(ConfigError, match="not divisible by norm_num_groups"):
        ControlNetModel(**control_config() | {"norm_num_groups": 7})
