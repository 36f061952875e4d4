"""FreeU against the reference's: the U-Net alone, and whole pictures through both doors."""

from __future__ import annotations

import diffusers
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from support.checkpoints import SHAPES, UNET, randomize
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, compare

FACTORS = {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}


@pytest.mark.parametrize(("name", "size"), [("sd15", (8, 8)), ("sd15", (9, 14)), ("sd21", (16, 8)), ("sdxl", (8, 12))])
def test_unet(name, size):
    config = SHAPES[name].unet if name in SHAPES else UNET
    theirs = randomize(diffusers.UNet2DConditionModel(**config))
    ours = sfumato.UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    sample = torch.randn((2, 4, *size), generator=generator(0))
    states = torch.randn((2, 6, ours.config.per_block("cross_attention_dim")[0]), generator=generator(1))
    more = {}
    if ours.config.addition_embed_type is not None:
        pooled = ours.config.projection_class_embeddings_input_dim - 6 * ours.config.addition_time_embed_dim
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(2, pooled), "time_ids": torch.ones(2, 6)}}
    with torch.no_grad():
        plain = ours(sample, 300, states, **more).sample
        ours.enable_freeu(**FACTORS)
        theirs.enable_freeu(**FACTORS)
        mine, other = ours(sample, 300, states, **more).sample, theirs(sample, 300, states, **more).sample
        assert distance(mine, other) < FLOAT32
        assert distance(mine, plain) > 100 * FLOAT32
        ours.disable_freeu()
        assert torch.equal(ours(sample, 300, states, **more).sample, plain)


def test_pictures(ours, theirs):
    mine, other = ours(), theirs()
    mine.enable_freeu(**FACTORS)
    other.enable_freeu(**FACTORS)
    try:
        compare(mine, other, prompt=PROMPTS[0], num_inference_steps=3)
        request = sfumato.GenerateRequest(prompt=PROMPTS[0], steps=2, seed=4)
        switched = mine.generate(request)
        assert switched.recipes[0]["request"]["freeu"] == FACTORS
    finally:
        mine.disable_freeu()
        other.disable_freeu()
    asked = mine.generate(request.replace(freeu=sfumato.FreeU(**FACTORS)))
    assert asked.images[0].tobytes() == switched.images[0].tobytes() != mine.generate(request).images[0].tobytes()
    assert mine.unet.freeu is None


def test_what_is_no_number_is_refused(ours):
    with pytest.raises(UsageError, match="FreeU takes four numbers"):
        ours().enable_freeu("a", 1, 1, 1)
