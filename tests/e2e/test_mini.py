"""The small real checkpoint, from words to pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sfumato
from sfumato import GenerateRequest
from sfumato.images import psnr
from support.assets import asset

PROMPTS = ("a red heart", "a smiley face")


@pytest.fixture(scope="module")
def pipe():
    loaded = sfumato.load(asset("mini"), device="cpu", dtype=torch.float32)  # where equal means to the last bit or so
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def request_of_two():
    return GenerateRequest(prompt=PROMPTS, steps=15, seed=3, scheduler="dpmpp_2m")


@pytest.fixture(scope="module")
def first(pipe, request_of_two):
    return pipe.generate(request_of_two)


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_two_pictures_that_are_pictures(first):
    assert [image.size for image in first.images] == [(64, 64), (64, 64)]
    assert first.notes == ()
    assert all(pixels(image).std() > 20 for image in first.images)  # not grey, not black
    heart, smiley = (pixels(image).reshape(-1, 3) for image in first.images)
    reds = [int(((p[:, 0] > 150) & (p[:, 1] < 110) & (p[:, 2] < 110)).sum()) for p in (heart, smiley)]
    yellows = [int(((p[:, 0] > 150) & (p[:, 1] > 120) & (p[:, 2] < 120)).sum()) for p in (heart, smiley)]
    assert reds[0] > reds[1]
    assert yellows[1] > yellows[0]


def test_the_first_call_and_later_calls_are_equal(pipe, request_of_two, first):
    """SPEC A6."""
    again = pipe.generate(request_of_two)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in first.images]


def test_a_picture_of_a_batch_is_the_picture_alone(pipe, first):
    """SPEC A8 and B8: up to the rounding of sums that a batch takes in another order."""
    for i, recipe in enumerate(first.recipes):
        alone = pipe.generate(GenerateRequest.from_dict(recipe["request"]))
        assert alone.seeds == (3 + i,)
        assert np.abs(pixels(alone.images[0]) - pixels(first.images[i])).max() <= 1


def test_slicing_draws_the_same_picture(pipe, request_of_two, first):
    """SPEC A7."""
    pipe.enable_attention_slicing("max")
    try:
        sliced = pipe.generate(request_of_two)
    finally:
        pipe.disable_attention_slicing()
    for a, b in zip(sliced.images, first.images, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


def test_bfloat16_draws_nearly_the_same_picture(first, request_of_two):
    """SPEC B2 and the seed contract: precision does not change the noise, so the subject stays."""
    half = sfumato.load(asset("mini"), device="cpu", dtype=torch.bfloat16).generate(request_of_two)
    assert all(psnr(a, b) >= 30 for a, b in zip(half.images, first.images, strict=True))


def test_image_to_image_keeps_what_strength_leaves(pipe, first, tmp_path):
    first.images[0].save(tmp_path / "start.png")
    results = [
        pipe.generate(
            GenerateRequest(prompt=PROMPTS[0], steps=15, seed=1, image=str(tmp_path / "start.png"), strength=strength)
        ).images[0]
        for strength in (0.2, 0.9)
    ]
    far = [np.abs(pixels(image) - pixels(first.images[0])).mean() for image in results]
    assert far[0] < far[1]
