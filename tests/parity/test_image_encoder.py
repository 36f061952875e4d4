"""CLIP's image encoder against transformers, and images as it reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato.models
from sfumato.errors import ConfigError
from sfumato.models.image_encoder import clip_pixels
from support.checkpoints import randomize
from support.compare import FLOAT32, distance, generator

CONFIG = {"hidden_size": 32, "intermediate_size": 48, "projection_dim": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}  # fmt: skip


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_image_encoder(act, tmp_path):
    import transformers

    config = transformers.CLIPVisionConfig(**CONFIG, hidden_act=act)
    theirs = randomize(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = sfumato.models.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, 28, 28, generator=generator())
    with torch.no_grad():
        mine, other = ours(pixels, output_hidden_states=True), theirs(pixels, output_hidden_states=True)
    assert distance(mine.image_embeds, other.image_embeds) < FLOAT32
    assert len(mine.hidden_states) == len(other.hidden_states) == 4
    for one, two in zip(mine.hidden_states, other.hidden_states, strict=True):
        assert distance(one, two) < FLOAT32
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).image_embeds, other.image_embeds)


@pytest.mark.parametrize("size", [(40, 28), (28, 57), (28, 28), (11, 13)])
def test_images_are_read_as_the_reference_reads_them(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    edge = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    wanted = CLIPImageProcessorPil(**edge)(image, return_tensors="pt").pixel_values
    assert distance(clip_pixels(image, 28), wanted) < 1e-6
    tensor = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    assert distance(clip_pixels([image, tensor], 28), torch.cat([wanted, wanted])) < 1e-6


def test_a_config_that_cannot_be():
    with pytest.raises(ConfigError, match="image_size = 28 is not divisible by patch_size = 5"):
        sfumato.models.CLIPVisionModelWithProjection(**CONFIG | {"patch_size": 5})
