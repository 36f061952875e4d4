"""The model that comes with the package, from words to pictures."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import Fast, GenerateRequest
from sfumato.errors import ConfigError
from sfumato.images import psnr
from sfumato.metadata.carriers import read_recipe
from support.processes import MAIN

PROMPTS = ("a red apple, 3d", "a blue heart, flat style", "a rocket, line art", "a sunflower, gradient")


@pytest.fixture(scope="module")
def pipe():
    return sfumato.load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe.generate(GenerateRequest(prompt=PROMPTS, seed=7, **pipe.suggested))


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_it_is_what_load_loads(pipe):
    assert pipe.name == "built-in"
    assert set(pipe.suggested) == {"steps", "guidance_scale"}
    assert sfumato.StableDiffusionImg2ImgPipeline.from_pipe(pipe).words is pipe.words is not None


def test_pictures_are_pictures_of_what_was_asked_for(drawn):
    assert drawn.notes == ()
    assert [image.size for image in drawn.images] == [(128, 128)] * 4
    apple, heart, rocket, sunflower = map(pixels, drawn.images)
    for picture in (apple, heart, rocket, sunflower):
        assert picture.std() > 30
        assert np.median(picture[:4], axis=(0, 1)).min() > 180  # a thing on white or on a pale tint
    red, blue = (int((p[..., 0] - p[..., 2]).sum()) for p in (apple, heart))
    assert red > 0 > blue
    colour = [np.ptp(p, axis=2).mean() for p in (apple, rocket)]
    assert colour[0] > 4 * colour[1]  # line art is black on white
    vivid = sunflower[np.ptp(sunflower, axis=2) > 100].mean(0)
    assert vivid[2] < 0.5 * vivid[0]  # yellow and brown


def test_a_run_holds_no_tensors_once_it_has_ended(pipe):
    """In a circle of references, they would stay until Python collects garbage, which it rarely does."""
    request = GenerateRequest(prompt=PROMPTS[0], seed=7, steps=4, width=64, height=64)
    pipe.generate(request)
    gc.collect()
    gc.disable()
    try:
        pipe.generate(request)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [one.shape for one in gc.garbage if isinstance(one, torch.Tensor)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_a_promise_is_kept_with_less_work_and_its_recipe_repeats_it(pipe, drawn):
    fast = pipe.generate(drawn.request.replace(fast=Fast(promise=30)))
    assert fast.notes == ()
    near = [psnr(a, b) for a, b in zip(fast.images, drawn.images, strict=True)]
    assert np.median(near) >= 30
    assert 24 <= min(near) < np.inf
    told, whole = GenerateRequest.from_dict(fast.recipes[1]["request"]), []
    assert told.fast != Fast(promise=30)  # it names the methods
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: whole.append(1))
    try:
        alone = pipe.generate(told).images[0]
    finally:
        handle.remove()
    assert len(whole) <= 0.55 * told.chosen_steps
    assert np.abs(pixels(alone) - pixels(fast.images[1])).max() <= 2  # sums of a batch have another order
    assert pipe.generate(told).images[0].tobytes() == alone.tobytes()


def test_weights_in_eight_bits_draw_nearly_the_same(pipe, drawn):
    light = sfumato.load(device="cpu", dtype=torch.float32, eight_bit=True)
    result = light.generate(drawn.request)
    near = [psnr(a, b) for a, b in zip(result.images, drawn.images, strict=True)]
    assert 40 <= np.median(near) < np.inf
    assert min(near) >= 30
    assert result.recipes[0]["model"] == drawn.recipes[0]["model"] | {"eight_bit": True}


def test_a_scene_has_the_background_and_the_things_that_were_asked_for(pipe):
    request = GenerateRequest(prompt="two red apples on a blue background, flat style", seed=11, **pipe.suggested)
    (picture,) = map(pixels, pipe.generate(request).images)
    corners = picture[[2, 2, -3, -3], [2, -3, 2, -3]].mean(0)
    assert corners[2] > 1.5 * corners[0]
    red = (picture[..., 0] > picture[..., 2] + 80) & (picture[..., 0] > picture[..., 1] + 80)
    left, right = red[:, :64].sum(), red[:, 64:].sum()
    assert min(left, right) > 300


def test_other_seeds_give_other_pictures(pipe):
    request = GenerateRequest(prompt=("a red apple, 3d",) * 4, seed=1, **pipe.suggested)
    a, b, c, d = map(pixels, pipe.generate(request).images)
    apart = [float(np.sqrt(((x - y) ** 2.0).mean())) for x, y in ((a, b), (b, c), (c, d), (d, a))]
    assert min(apart) > 25  # the model before this one: 4


def test_the_negative_prompt_and_guidance_count(pipe):
    base = GenerateRequest(prompt="a heart, flat style", seed=3, **pipe.suggested)
    plain, other, strong = (
        pixels(pipe.generate(request).images[0])
        for request in (base, base.replace(negative_prompt="a red heart"), base.replace(guidance_scale=6.0))
    )
    assert np.abs(plain - other).mean() > 2
    assert np.abs(plain - strong).mean() > 1


def test_a_picture_of_a_batch_is_the_picture_alone(pipe, drawn):
    for i, recipe in enumerate(drawn.recipes):
        alone = pipe.generate(GenerateRequest.from_dict(recipe["request"]))
        assert alone.seeds == (7 + i,)
        assert np.abs(pixels(alone.images[0]) - pixels(drawn.images[i])).max() <= 1


def test_half_precision_draws_nearly_the_same(pipe):
    """Of few steps, as processors without bfloat16 take seconds for each."""
    request = GenerateRequest(prompt="a red apple, 3d", seed=7, steps=4)
    half = sfumato.load(device="cpu", dtype=torch.bfloat16)
    assert psnr(half.generate(request).images[0], pipe.generate(request).images[0]) > 20


@pytest.mark.parametrize("prompt", ["a zebu, 3d", "кит", "!"])
def test_a_prompt_without_a_known_word_is_drawn_and_said_so(pipe, prompt):
    result = pipe.generate(GenerateRequest(prompt=prompt, seed=1, steps=2))
    (note,) = result.notes
    assert repr(prompt) in note
    examples = note.split("such as ")[1].split(" (")[0].split(", ")
    assert len(examples) == 3
    assert set(examples) <= set(pipe.words.names)


@pytest.mark.parametrize("prompt", ["", "apples", "A RED APPLE", "an apple that is very small"])
def test_a_known_word_is_known_in_any_form(pipe, prompt):
    assert pipe.generate(GenerateRequest(prompt=prompt, seed=1, steps=1)).notes == ()


def test_a_style_alone_is_no_thing_to_draw(pipe):
    assert len(pipe.words.notes(["3d", "3d", "the flat one", "a cat"])) == 2


def test_a_suggestion_that_cannot_be_made_is_refused(checkpoints, tmp_path):
    copy = Path(shutil.copytree(checkpoints("sd15"), tmp_path / "copy"))
    (copy / "sfumato.json").write_text(json.dumps({"seed": 3}))
    with pytest.raises(ConfigError, match="cannot suggest 'seed'"):
        sfumato.load(copy, device="cpu")


def test_the_command_line_draws_with_it(server, tmp_path):
    words = ["generate", "a zebu", "--count", "4", "--grid", "-o", "x.png"]
    done = server.run(MAIN, words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.splitlines()[0].startswith("note: the small model does not know 'a zebu'")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (256, 256)
    told = read_recipe(tmp_path / "x.png")
    assert told["model"]["name"] == "built-in"
    own = json.loads((Path(sfumato.__file__).parent / "mini" / "sfumato.json").read_text())
    assert {name: told["request"][name] for name in own} == own
