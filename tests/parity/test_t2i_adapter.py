"""T2I-Adapters against the reference: features, what the U-Net makes of them, and images."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.control_file import adapter_names
from sfumato.checkpoints.rules import original_name
from sfumato.errors import CheckpointError, UsageError
from sfumato.models import T2IAdapter
from sfumato.request import Control, GenerateRequest
from sfumato.runtime.choices import count_parameters
from support.checkpoints import EVERY, randomize
from support.compare import FLOAT32, distance, generator
from support.control import control_picture

# For small checkpoints whose latents are half as large as their images.
KINDS = {
    "full": ("sd15", {"adapter_type": "full_adapter", "channels": [16, 16, 32, 32]}),
    "light": ("sd15", {"adapter_type": "light_adapter", "channels": [16, 16, 32], "in_channels": 1, "num_res_blocks": 3}),
    "xl": ("sdxl", {"adapter_type": "full_adapter_xl", "channels": [16, 32, 64, 64]}),
}  # fmt: skip


def adapter(library, kind, seed=0):
    return randomize(library.T2IAdapter(**KINDS[kind][1], downscale_factor=2), seed + 20)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_references(kind, tmp_path):
    theirs = adapter(diffusers, kind)
    theirs.save_pretrained(tmp_path)
    ours = T2IAdapter.from_pretrained(tmp_path)
    picture = torch.rand(2, ours.config.in_channels, 18, 16, generator=generator())
    with torch.no_grad():
        for one, two in zip(ours(picture), theirs(picture), strict=True):
            assert distance(one, two) < FLOAT32
    assert count_parameters(ours.config) == sum(one.numel() for one in ours.parameters())


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_the_unet_adds_features_where_the_reference_does(shape):
    unets = [randomize(library.UNet2DConditionModel(**EVERY[shape].unet)) for library in (sfumato, diffusers)]
    widths, side = EVERY[shape].unet["block_out_channels"], 8
    features = [torch.randn(2, width, side >> i, side >> i, generator=generator(i)) for i, width in enumerate(widths)]
    if (
        shape == "sdxl"
    ):  # halved before the features are added where a block has no attention; a third one in the middle
        features = [torch.randn(2, 16, 4, 4), torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)]
    told = {
        "encoder_hidden_states": torch.randn(2, 5, EVERY[shape].unet["cross_attention_dim"], generator=generator(7))
    }
    if shape == "sdxl":
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 40), "time_ids": torch.ones(2, 6)}
    x = torch.randn(2, 4, side, side, generator=generator(8))
    with torch.no_grad():
        mine = unets[0](x, 5, **told, down_intrablock_additional_residuals=features).sample
        other = unets[1](x, 5, **told, down_intrablock_additional_residuals=list(features)).sample
        assert distance(mine, other) < FLOAT32
        assert distance(mine, unets[0](x, 5, **told).sample) > 0.01


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        adapter(sfumato, kind).save_pretrained(root / kind)
    control_picture().save(root / "picture.png")
    return root


@pytest.mark.parametrize("kind", ["full", "light"])
def test_images_are_the_references(kind, files, checkpoints, theirs):
    pipeline = sfumato.load(checkpoints(), device="cpu", dtype=torch.float32)
    control = Control(model=str(files / kind), image=str(files / "picture.png"), scale=0.8)
    request = GenerateRequest(prompt="a photo", seed=3, steps=3, controls=(control,))
    mine = pipeline.generate(request).images[0]
    parts = {key: value for key, value in theirs().components.items() if key != "image_encoder"}
    other = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter(diffusers, kind), requires_safety_checker=False)  # fmt: skip
    other.set_progress_bar_config(disable=True)
    picture = control_picture()
    picture = picture if kind == "full" else torch.from_numpy(__import__("numpy").asarray(picture) / 255.0).float().mean(-1)[None, None]  # fmt: skip
    image = other("a photo", image=picture, height=16, width=16, adapter_conditioning_scale=0.8, num_inference_steps=3, generator=generator(3)).images[0]  # fmt: skip
    import numpy as np

    assert abs(np.asarray(mine).astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_an_adapter_and_a_controlnet_at_once(files, checkpoints):
    from support.control import control_net

    control_net(sfumato).save_pretrained(files / "net")
    pipeline = sfumato.load(checkpoints(), device="cpu", dtype=torch.float32)
    every = [Control(model=str(files / name), image=str(files / "picture.png")) for name in ("full", "net", "light")]
    made = [pipeline.generate(GenerateRequest(prompt="a", seed=1, steps=2, controls=tuple(some))) for some in (every, every[:2], every[1:])]  # fmt: skip
    assert len({image.tobytes() for result in made for image in result.images}) == 3


def test_adapters_of_another_family_or_in_another_file(files, checkpoints, tmp_path):
    pipeline = sfumato.load(checkpoints(), device="cpu", dtype=torch.float32)
    control = Control(model=str(files / "xl"), image=str(files / "picture.png"))
    with pytest.raises(UsageError, match="made for another family"):
        pipeline.generate(GenerateRequest(prompt="a", controls=(control,)))
    save_file({"emb_params": torch.zeros(1)}, tmp_path / "word.safetensors")
    with pytest.raises(CheckpointError, match="is a textual inversion, not a ControlNet"):
        pipeline.generate(GenerateRequest(prompt="a", controls=(control.replace(model=str(tmp_path / "word.safetensors")),)))  # fmt: skip


def in_original_layout(net):
    return {original_name(key, adapter_names(net.config))[0]: value for key, value in net.state_dict().items()}


@pytest.mark.parametrize("layout", ["original", "ours"])
@pytest.mark.parametrize("kind", KINDS)
def test_single_files_tell_their_config(kind, layout, tmp_path):
    own = KINDS[kind][1] | ({"num_res_blocks": 2} if kind != "light" else {})
    net = randomize(T2IAdapter(**own, downscale_factor=16 if kind == "xl" else 2), 20)
    tensors = in_original_layout(net) if layout == "original" else net.state_dict()
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "net.safetensors")
    found = T2IAdapter.from_single_file(tmp_path / "net.safetensors")
    assert found.config == net.config
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())
    with pytest.raises(CheckpointError, match=r"open it with T2IAdapter\.from_single_file"):
        sfumato.ControlNetModel.from_single_file(tmp_path / "net.safetensors")


def test_original_names_are_those_of_published_files():
    """As `TencentARC/T2I-Adapter` has them: all residual blocks numbered through, but for light ones."""
    full, light = (in_original_layout(T2IAdapter(**KINDS[kind][1], downscale_factor=2)) for kind in ("full", "light"))
    assert {"conv_in.weight", "body.0.block1.weight", "body.1.block2.bias", "body.4.in_conv.weight", "body.7.block2.weight"} <= full.keys()  # fmt: skip
    assert {"body.0.in_conv.weight", "body.0.body.2.block1.weight", "body.3.out_conv.bias"} <= light.keys()
