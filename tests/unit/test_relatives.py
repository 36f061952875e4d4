"""Relatives that read an image, by requests: recipes, tiles, plans, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sfumato
from sfumato.errors import UsageError
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance, guide_both
from sfumato.pipelines.place import _sizes
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import task_of
from sfumato.runtime.chunks import tile_starts
from support.pictures import picture
from support.relatives import RELATIVES, write_relative
from unit.test_guidance import Echo


@pytest.fixture
def load(once):
    return lambda name: sfumato.DiffusionPipeline.from_pretrained(
        once(f"relatives/{name}", lambda folder: write_relative(folder, name))
    )


@pytest.fixture
def request_for(tmp_path):
    """`request_for("depth", …)`: a request with the files that this checkpoint reads."""
    picture(24, 40).save(tmp_path / "image.png")
    Image.linear_gradient("L").resize((24, 40)).save(tmp_path / "depth.png")

    def get(name, **fields):
        files = {"image": str(tmp_path / "image.png")}
        files |= {"depth": str(tmp_path / "depth.png")} if name == "depth" else {}
        prompt = "" if name == "variations" else "cat"
        return GenerateRequest(**{"prompt": prompt, "seed": 3, "steps": 2} | files | fields)

    return get


SIZES = {
    "edit": (24, 40),
    "edit-xl": (24, 40),
    "depth": (24, 40),
    "by-depth": (24, 40),
    "x4": (96, 160),
    "x2": (48, 80),
    "variations": (16, 16),
    "likeness": (16, 16),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_request_is_drawn_and_its_recipe_draws_it_again(name, load, request_for):
    pipe = load(name)
    request = request_for(name, count=2)
    result = pipe.generate(request)
    assert [image.size for image in result.images] == [SIZES[name]] * 2
    assert set(request.pictures) <= set(result.recipes[1])
    again = pipe.generate(GenerateRequest.from_dict(result.recipes[1]["request"]))
    assert np.abs(np.asarray(again.images[0]).astype(int) - np.asarray(result.images[1])).max() <= 1
    assert (np.asarray(result.images[0]) != np.asarray(result.images[1])).mean() > 0.5


@pytest.mark.parametrize(
    ("name", "fields"),
    [("edit", {"image_guidance_scale": 4.0}), ("x4", {"noise_level": 300}), ("likeness", {"noise_level": 900})],
)
def test_fields_of_their_own_change_the_picture(name, fields, load, request_for):
    pipe = load(name)
    plain, other = (pipe.generate(request_for(name, **more)).images[0] for more in ({}, fields))
    assert (np.asarray(plain) != np.asarray(other)).mean() > 0.3


def test_near_and_far_change_the_picture(load, request_for, tmp_path):
    pipe, request = load("depth"), request_for("depth")
    plain = pipe.generate(request).images[0]
    Image.linear_gradient("L").rotate(180).resize((24, 40)).save(tmp_path / "other.png")
    other = pipe.generate(request.replace(depth=str(tmp_path / "other.png"))).images[0]
    assert (np.asarray(plain) != np.asarray(other)).mean() > 0.3


NEEDS = {
    "edit": ({"image": None}, "InstructPix2Pix needs image latents .8 channels in all.; pass an image"),
    "depth": ({"depth": None}, "needs depth .5 channels in all.; pass an image and its depth map"),
    "x4": ({"image": None}, "upscaler needs low-resolution image"),
    "variations": ({"image": None}, "variations needs an image instead of a prompt; pass one"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_is_named(name, load, request_for):
    changes, says = NEEDS[name]
    with pytest.raises(UsageError, match=says):
        load(name).generate(request_for(name, **changes))


def test_what_is_not_read_is_refused(ours, load, request_for, tmp_path):
    with pytest.raises(UsageError, match=r"Stable Diffusion 1\.x does not use a depth map; omit it"):
        ours("sd15").generate(request_for("depth"))
    Image.new("L", (24, 40), 255).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="InstructPix2Pix does not use a mask; omit it"):
        load("edit").generate(request_for("edit", mask=sfumato.Mask(file=str(tmp_path / "mask.png"))))
    with pytest.raises(UsageError, match="needs EulerDiscreteScheduler, not DDIMScheduler"):
        load("x2").generate(request_for("x2", scheduler="ddim"))
    with pytest.raises(UsageError, match="noise_level"):
        GenerateRequest(noise_level=1000)
    assert "the prompt has no effect" in load("variations").generate(request_for("variations", prompt="cat")).notes[0]


@given(side=st.integers(1, 300), size=st.integers(1, 80))
def test_tiles_cover_a_side_and_overlap(side, size):
    starts = tile_starts(side, size)
    assert starts[0] == 0
    assert max(starts) + size >= side or size >= side
    assert all(0 < b - a <= max(1, size * 3 // 4) for a, b in pairwise(starts))
    assert all(start + size <= side for start in starts) or starts == [0]


class Pointwise(Echo):
    """Predicts a picture's own values, brighter on the prompt's side, and notes how large they are."""

    def forward(self, x, time, context, return_dict=True):
        self.calls.append(tuple(x.shape[2:]))
        return (context.widen(x[:, :4]) * context.states.mean(dim=(1, 2))[:, None, None, None],)


def test_tiles_are_the_whole_where_a_prediction_is_local():
    x, told = torch.randn(2, 4, 30, 21, generator=torch.Generator().manual_seed(1)), torch.ones(2, 5, 6)
    extra = (torch.zeros(2, 3, 30, 21),)
    whole = Guidance(unet=Pointwise(), conditioning=Conditioning((-told, told), extra=extra), scale=3.0)
    tiled = Guidance(unet=Pointwise(), conditioning=Conditioning((-told, told), extra=extra), scale=3.0, tile=8)
    assert torch.allclose(tiled(x, 1.0), whole(x, 1.0), atol=1e-5)
    assert whole.unet.calls == [(30, 21)]
    assert set(tiled.unet.calls) == {(8, 8)}


def test_a_large_image_is_enlarged_in_tiles_of_one_size(load, tmp_path):
    """A call draws it whole, as the ecosystem does."""
    pipe, sizes = load("x4"), []
    assert pipe.unet.config.latent_size == (8, 8)
    pipe.unet.register_forward_pre_hook(lambda unet, arguments: sizes.append(tuple(arguments[0].shape[2:])))
    picture(40, 20).save(tmp_path / "image.png")
    request = GenerateRequest(prompt="cat", seed=3, steps=1, image=str(tmp_path / "image.png"))
    result = pipe.generate(request)
    assert result.images[0].size == (160, 80)
    assert set(sizes) == {(8, 8)}
    task = task_of(_sizes(pipe.parts, ()), request.replace(width=160, height=80))
    assert (task.tile, task.tiles, task.rows, task.from_picture) == (8, len(sizes), 2, False)
    larger = task_of(_sizes(pipe.parts, ()), request.replace(width=1600, height=800))
    assert larger.unet_layers == task.unet_layers  # so that the memory of a call stays as it is
    sizes.clear()
    pipe.set_progress_bar_config(disable=True)
    pipe("cat", picture(40, 20), num_inference_steps=1)
    assert sizes == [(20, 40)]


def test_plans_count_branches_and_image_encoders(load, request_for):
    pipe = load("edit")
    assert task_of(_sizes(pipe.parts, ()), request_for("edit")).rows == 3
    assert task_of(_sizes(pipe.parts, ()), request_for("edit", image_guidance_scale=0.5)).rows == 2
    sees = load("likeness").parts
    counted = sum(
        parameter.numel()
        for role in ("text_encoder", "image_encoder")
        for parameter in getattr(sees, role).parameters()
    )
    assert _sizes(sees, ()).text_encoder.parameters == counted


def test_guidance_by_image_and_prompt_is_a_plane():
    none, image, both = (torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert torch.allclose(guide_both(none, image, both, 1.0, 1.0), both, atol=1e-6)
    assert torch.allclose(guide_both(none, image, image, 2.0, 7.0), none + 2 * (image - none), atol=1e-6)
    assert torch.allclose(guide_both(none, none, both, 5.0, 2.0), none + 2 * (both - none), atol=1e-6)
