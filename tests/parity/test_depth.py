"""Depth estimation against the reference: both forms of DPT, what prepares images for it, and what files may say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import sfumato
from sfumato.configs import DPTConfig
from sfumato.errors import CheckpointError, ConfigError, UsageError
from sfumato.image_processor import DPTImageProcessor
from sfumato.models import DPTForDepthEstimation
from support.checkpoints import randomize
from support.compare import FLOAT32, distance
from support.control import control_picture
from support.relatives import BIT, DPT, HYBRID, write_relative

PUBLISHED = {"is_hybrid": True, "neck_hidden_sizes": [256, 512, 768, 768], "reassemble_factors": [1, 1, 1, 0.5]}


def theirs(config):
    return randomize(transformers.DPTForDepthEstimation(transformers.DPTConfig(**config))).eval()


def compared(config, folder, count, side):
    """Ours as loaded from what theirs saves, the pixels, and their map of them, which ours equals."""
    other = theirs(config)
    other.save_pretrained(folder)
    mine = DPTForDepthEstimation.from_pretrained(folder)
    for network in (mine, other):
        assert mine.config.parameters == sum(weight.numel() for weight in network.parameters())
    pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = other(pixels).predicted_depth
        assert distance(mine(pixels), expected) < FLOAT32
    return mine, pixels, expected


@pytest.mark.parametrize("config", [DPT, HYBRID], ids=["plain", "hybrid"])
def test_maps_are_the_references(config, tmp_path):
    mine, pixels, expected = compared(config, tmp_path, 2, 64)
    assert expected.std() > 0
    with torch.no_grad():
        mine.save_pretrained(tmp_path / "again")
        again = transformers.DPTForDepthEstimation.from_pretrained(tmp_path / "again")
        assert torch.equal(again(pixels).predicted_depth, expected)


@pytest.mark.long
def test_the_published_size(tmp_path):
    """DPT-Hybrid as Stable Diffusion 2 depth has it, with random weights."""
    _, _, expected = compared(PUBLISHED, tmp_path, 1, 384)
    assert expected.shape == (1, 384, 384)


def test_images_are_prepared_the_same(tmp_path):
    size = {"height": 64, "width": 64}
    other = transformers.DPTImageProcessor(size=size, resample=2, image_mean=[0.4, 0.5, 0.6])
    other.save_pretrained(tmp_path)
    mine = DPTImageProcessor.from_pretrained(tmp_path)
    pictures = [control_picture(30, 50), control_picture(90, 70, seed=1)]
    expected = other(images=pictures, return_tensors="pt").pixel_values
    assert distance(mine(pictures), expected) < FLOAT32
    mine.save_pretrained(tmp_path / "again")
    again = transformers.DPTImageProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(again(images=pictures, return_tensors="pt").pixel_values, expected)
    # Tensors and arrays in [0, 1] are what their pictures are; the reference divides them by 255 once more.
    array = torch.from_numpy(np.asarray(pictures[0]) / 255).float()
    assert distance(mine(array.permute(2, 0, 1)), expected[:1]) < 0.02


def test_a_checkpoint_without_its_estimator_wants_a_map(once, tmp_path):
    import shutil

    folder = once("relatives/by-depth", lambda folder: write_relative(folder, "by-depth"))
    shutil.copytree(folder, tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "depth_estimator")
    pipe = sfumato.DiffusionPipeline.from_pretrained(tmp_path / "less")
    assert pipe.depth_estimator is None
    with pytest.raises(UsageError, match="pass an image and its depth map"):
        pipe("a cat", image=control_picture(24, 40))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"readout_type": "add"}, "readout_type = 'add' is not supported"),
        ({"backbone_config": BIT | {"layer_type": "preactivation"}}, "layer_type = 'preactivation' is not supported"),
        ({"is_hybrid": False}, "a backbone_config is only supported with is_hybrid = true"),
        ({"backbone_out_indices": [0, 1, 2]}, "must have four entries"),
        ({"backbone_out_indices": [0, 1, 2, 4]}, "below num_hidden_layers = 4"),
        ({"hidden_size": 30}, "hidden_size = 30 is not divisible by num_attention_heads = 4"),
    ],
)
def test_what_is_not_supported_is_one_sentence(changes, says):
    with pytest.raises(ConfigError, match=says):
        DPTForDepthEstimation(**HYBRID | changes)


def test_sizes_that_cannot_be():
    for size in ({"height": 64, "width": 32}, 0, "large"):
        with pytest.raises(ConfigError, match="size must be one number of pixels"):
            DPTImageProcessor(size=size)


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs(HYBRID).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.head.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.head\.0\.weight"):
        DPTForDepthEstimation.from_pretrained(tmp_path)
    assert DPTConfig(**PUBLISHED).parameters > 120_000_000
