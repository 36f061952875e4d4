"""The model that comes with the package, from words to pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import GenerateRequest
from sfumato.errors import ConfigError
from sfumato.images import psnr, read_recipe

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
    assert [image.size for image in drawn.images] == [(64, 64)] * 4
    apple, heart, rocket, sunflower = map(pixels, drawn.images)
    for picture in (apple, heart, rocket, sunflower):
        assert picture.std() > 30
        assert picture[0, 0].min() > 200  # a thing on white
    red, blue = (int((p[..., 0] - p[..., 2]).sum()) for p in (apple, heart))
    assert red > 0 > blue
    colour = [np.ptp(p, axis=2).mean() for p in (apple, rocket)]
    assert colour[0] > 4 * colour[1]  # line art is black on white
    middle = sunflower[16:40, 16:48].reshape(-1, 3).mean(0)
    assert middle[2] < 0.8 * middle[0]  # yellow and brown


def test_a_picture_of_a_batch_is_the_picture_alone(pipe, drawn):
    for i, recipe in enumerate(drawn.recipes):
        alone = pipe.generate(GenerateRequest.from_dict(recipe["request"]))
        assert alone.seeds == (7 + i,)
        assert np.abs(pixels(alone.images[0]) - pixels(drawn.images[i])).max() <= 1


def test_half_precision_draws_nearly_the_same(pipe, drawn):
    half = sfumato.load(device="cpu", dtype=torch.bfloat16)
    again = half.generate(drawn.request)
    assert min(psnr(a, b) for a, b in zip(again.images, drawn.images, strict=True)) > 20


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


def test_the_command_line_draws_with_it(tmp_path):
    words = ["generate", "a zebu", "--count", "4", "--grid", "-o", "x.png"]
    command = [Path(sys.executable).with_name("sfumato"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("note: the small model does not know 'a zebu'")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (128, 128)
    told = read_recipe(tmp_path / "x.png")
    assert told["model"]["name"] == "built-in"
    own = json.loads((Path(sfumato.__file__).parent / "mini" / "sfumato.json").read_text())
    assert {name: told["request"][name] for name in own} == own
