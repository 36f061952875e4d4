"""Painting a part of an image: what is read of it, what is put back, and that the rest stays, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sfumato
from sfumato.errors import UsageError
from sfumato.masks import called_canvas, crop_region, requested_canvas
from sfumato.request import GenerateRequest, Mask
from support.pictures import picture


def spot(size=(40, 24), box=(7, 5, 21, 16), level=255):
    image = Image.new("L", size)
    image.paste(level, box)
    return image


@pytest.fixture
def files(tmp_path):
    """`files("name", image)` saves one and returns its path."""

    def save(name, image):
        image.save(tmp_path / f"{name}.png")
        return str(tmp_path / f"{name}.png")

    return save


@pytest.fixture
def draw(ours, files):
    """`draw(mask, …)`: the input image, and what became of it, as arrays; fields of the mask, others of the request."""

    def get(mask, shape="sd15", image=None, *, edge=None, crop=None, extend=(0, 0, 0, 0), composite=True, **fields):
        image = image or picture(40, 24)
        file = None if mask is None else files("mask", mask)
        wanted = Mask(file=file, edge=edge, crop=crop, extend=extend, composite=composite)
        request = GenerateRequest(prompt="cat", seed=3, steps=3, image=files("image", image), mask=wanted, **fields)
        result = ours(shape).generate(request)
        return np.asarray(image), np.asarray(result.images[0]), result

    return get


@pytest.mark.parametrize("shape", ["sd15", "odd", "inpaint", "sdxl", "inpaint-xl"])
def test_outside_the_mask_no_pixel_changes(shape, draw):
    for how in ({}, {"edge": 4}, {"crop": 3}, {"crop": 3, "edge": 4}, {"strength": 0.5}):
        before, after, _ = draw(spot(), shape, **how)
        assert before.shape == after.shape
        changed = (before != after).any(axis=2)
        inside = np.asarray(spot()) > 0
        assert not changed[~inside].any(), how
        assert changed[inside].mean() > 0.5, how


def test_sides_that_are_no_multiple_stay_as_they_are(draw):
    mask = spot((37, 19), (3, 2, 37, 19))
    before, after, _ = draw(mask, image=picture(37, 19))
    assert before.shape == after.shape == (19, 37, 3)
    changed = (before != after).any(axis=2)
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[10:, 20:].mean() > 0.5


def test_a_size_of_its_own_is_that_of_image_and_mask(draw):
    before, after, _ = draw(spot(), width=24, height=32)
    small = np.asarray(Image.fromarray(before).resize((24, 32), Image.Resampling.LANCZOS))
    mask = np.asarray(spot().resize((24, 32), Image.Resampling.BOX))
    assert np.array_equal(after[mask == 0], small[mask == 0])


def test_without_a_composite_the_autoencoder_is_seen(draw):
    before, after, _ = draw(spot(), composite=False)
    assert (before != after).any(axis=2)[np.asarray(spot()) == 0].mean() > 0.5


def test_a_soft_edge_fades_within_the_mask(files):
    """At its rim the new is weakest; where the mask ends with the image, there is no rim."""
    mask = Mask(file=files("mask", spot(box=(0, 5, 21, 16))), edge=3)
    canvas = requested_canvas(Image.new("RGB", (40, 24)), mask, None, (40, 24), 8)
    alpha = np.asarray(canvas.finish(Image.new("RGB", (40, 24), "white")))[..., 0]
    assert alpha[10].tolist() == [255] * 18 + [191, 128, 64] + [0] * 19
    assert alpha[:, 5].tolist() == [0] * 5 + [64, 128, 191] + [255] * 5 + [191, 128, 64] + [0] * 8


@pytest.mark.parametrize("shape", ["sd15", "inpaint"])
def test_grey_is_painted_less_the_darker_it_is(shape, ours, files):
    """A level is the share of the steps, the last ones, in which its latents are free."""
    levels = np.repeat(np.array([0, 60, 130, 190, 255], np.uint8), 8)[None].repeat(16, 0)
    image, mask = files("image", picture(40, 16)), files("mask", Image.fromarray(levels))
    request = GenerateRequest(
        prompt="cat", seed=3, steps=8, scheduler="euler", image=image, mask=Mask(file=mask, composite=False)
    )
    assert kept_steps(shape, ours, request) == [8, 6, 3, 2, 0]


def kept_steps(shape, ours, request):
    """In how many steps each column of latents is that of the image, by what the task holds in place."""
    from sfumato.pipelines.run import Run
    from sfumato.pipelines.stages import Given

    pipe = ours(shape)
    scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    run = Run(pipe.parts, pipe.place, request, Given(generators=[torch.Generator().manual_seed(3)]), scheduler)
    held = [0] * 5
    for step in run.latents():
        kept = run.beginning.after
        stays = kept.clean if step.index == 7 else kept.table.noised(kept.clean, kept.noise, step.index + 1)
        for i, (a, b) in enumerate(zip(step.latents.split(4, 3), stays.split(4, 3), strict=True)):
            held[i] += torch.equal(a, b)
    return held


def test_a_batch_is_its_pictures(ours, files):
    for shape in ("sd15", "inpaint", "inpaint-xl"):
        mask = Mask(file=files("mask", spot()))
        request = GenerateRequest(
            prompt="cat", seed=3, steps=2, count=3, image=files("image", picture(40, 24)), mask=mask, strength=0.9
        )
        batch = ours(shape).generate(request).images
        for i, image in enumerate(batch):
            alone = ours(shape).generate(request.replace(seed=3 + i, count=1)).images[0]
            assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1


def test_a_recipe_paints_its_picture_again(ours, files):
    request = GenerateRequest(
        prompt="cat", seed=3, steps=2, image=files("image", picture(40, 24)),
        mask=Mask(file=files("mask", spot()), edge=2, crop=4, extend=(8, 0, 0, 0)),
    )  # fmt: skip
    result = ours("inpaint").generate(request)
    recipe = result.recipes[0]
    assert recipe["mask"].keys() == recipe["image"].keys() == {"sha256"}
    assert recipe["request"]["mask"] == {"file": request.mask.file, "extend": [8, 0, 0, 0], "edge": 2, "crop": 4}
    again = ours("inpaint").generate(GenerateRequest.from_dict(recipe["request"]))
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(again.images[0]))


@pytest.mark.parametrize("shape", ["sd15", "inpaint", "inpaint-xl"])
def test_a_border_is_painted_and_the_image_stays(shape, draw):
    """The default edge reaches 16 pixels into the image; with 0, not one of its pixels changes."""
    before, after, _ = draw(None, shape, extend=(8, 0, 4, 6), edge=0)
    assert after.shape == (30, 52, 3)
    assert np.array_equal(after[:24, 8:48], before)
    before, after, _ = draw(None, shape, image=picture(64, 64), extend=(16, 8, 0, 0))
    assert after.shape == (72, 80, 3)
    assert np.array_equal(after[24:, 32:], before[16:, 16:])
    assert (after[8:24, 40:] != before[:16, 24:]).mean() > 0.5


def test_a_border_and_a_mask_are_painted_together(draw):
    before, after, _ = draw(spot(), extend=(0, 0, 16, 0), edge=0)
    changed = (before != after[:, :40]).any(axis=2)
    assert not changed[np.asarray(spot()) == 0].any()
    assert changed[np.asarray(spot()) > 0].mean() > 0.5


BAD = {
    "a mask of another size": (lambda: spot((41, 24)), {}, r"the mask is 41 × 24 and its image 40 × 24; give a mask of the image's size"),
    "an empty mask": (lambda: spot(level=0), {}, r"nothing in the mask .*mask\.png is white, so nothing would change"),
    "an empty mask to crop to": (lambda: spot(level=0), {"crop": 4}, "is white, so nothing would change"),
    "too large a border": (lambda: None, {"extend": (16000, 0, 0, 16000)}, "extended image would be 16040 × 16024"),
    "strength without a step": (spot, {"strength": 0.1}, r"strength 0\.1 leaves none of the 3 steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_painted_is_one_sentence(name, draw):
    make, how, says = BAD[name]
    with pytest.raises(UsageError, match=says):
        draw(make(), **how)


def test_what_no_request_may_say():
    with pytest.raises(UsageError, match="a mask needs an image to change; give the image too"):
        GenerateRequest(mask=Mask(file="m.png"))
    with pytest.raises(UsageError, match="needs a file, or pixels to extend the image by"):
        Mask()
    with pytest.raises(UsageError, match="extend must be a list of 4"):
        Mask(extend=(1, 2, 3))
    with pytest.raises(UsageError, match="edge"):
        Mask(file="m.png", edge=-1)


def test_a_mask_of_everything_paints_all(draw):
    for shape in ("sd15", "inpaint"):
        before, after, _ = draw(spot(box=(0, 0, 40, 24)), shape)
        assert (before != after).any(axis=2).mean() > 0.9


@pytest.mark.parametrize("shape", ["sd15", "inpaint"])
def test_one_pixel(shape, draw):
    before, after, _ = draw(spot((1, 1), (0, 0, 1, 1)), shape, image=picture(1, 1))
    assert before.shape == after.shape == (1, 1, 3)
    before, after, _ = draw(spot(box=(9, 9, 10, 10)), shape)
    assert (before != after).any(axis=2).sum() <= 1


def test_masks_with_alpha_and_palettes(tmp_path):
    """What is transparent is not painted, whatever its colour; a palette's colours count, and not its numbers."""
    from sfumato.images import open_mask

    white = Image.new("RGBA", (4, 2), (255, 255, 255, 255))
    white.putpixel((1, 0), (255, 255, 255, 0))
    white.save(tmp_path / "alpha.png")
    assert np.asarray(open_mask(tmp_path / "alpha.png")).tolist() == [[255, 0, 255, 255], [255] * 4]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    assert np.asarray(open_mask(tmp_path / "palette.png")).tolist() == [[0, 255]]
    bits = Image.new("1", (2, 1))
    bits.putpixel((0, 0), 1)
    bits.save(tmp_path / "bits.png")
    assert np.asarray(open_mask(tmp_path / "bits.png")).tolist() == [[255, 0]]
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png")
    assert np.asarray(open_mask(tmp_path / "deep.png")).tolist() == [[0, 255]]


def test_a_checkpoint_that_reads_a_mask_says_so_without_one(ours, files):
    says = r"needs mask and masked image latents \(9 channels in all\); pass an image and its mask"
    for fields in ({}, {"image": files("image", picture())}):
        with pytest.raises(UsageError, match=says):
            ours("inpaint").generate(GenerateRequest(prompt="cat", **fields))


MASKS = {
    "no picture": ("cat", "must be a PIL image, an array or a tensor"),
    "whole numbers": (np.zeros((16, 16), np.uint8), "must be a PIL image, an array or a tensor of numbers"),
    "three channels": (torch.zeros(1, 3, 16, 16), "one channel and two sides"),
    "five sides": (torch.zeros(1, 1, 1, 16, 16), "one channel and two sides"),
    "255 for white": (torch.full((16, 16), 255.0), r"values in \[0, 1\]"),
    "two masks for three": (torch.zeros(2, 16, 16), "got 2 masks for 3 images"),
    "none": (None, "mask_image is missing"),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_no_mask_is_one_sentence(name, ours):
    mask, says = MASKS[name]
    with pytest.raises(UsageError, match=says):
        ours("sd15", sfumato.StableDiffusionInpaintPipeline)("cat", picture(), mask, num_images_per_prompt=3)


def test_calls_that_do_not_fit(ours):
    pipe = ours("sd15", sfumato.StableDiffusionInpaintPipeline)
    for call, says in (
        ({"image": None}, "image is missing"),
        ({"padding_mask_crop": 4, "image": torch.zeros(1, 3, 16, 16)}, "needs a PIL image and a PIL mask"),
        ({"padding_mask_crop": 4, "output_type": "np"}, "returns PIL images"),
        ({"padding_mask_crop": 4, "mask_image": spot(level=0)}, "the mask is empty"),
        ({"padding_mask_crop": 4, "mask_image": spot((9, 9))}, "the mask is 9 × 9 and its image 40 × 24"),
        ({"height": 21}, "height must be divisible by 2"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents must have the shape \(1, 4, 8, 8\)"),
    ):
        with pytest.raises(UsageError, match=says):
            pipe("cat", **({"image": picture(40, 24), "mask_image": spot()} | call))
    with pytest.raises(UsageError, match="got 2 masked_image_latents for 3 images"):
        ours("inpaint")("cat", picture(), spot(), torch.zeros(2, 4, 8, 8), num_images_per_prompt=3)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crops_hold_the_mask_and_stay_within_the_image(data):
    width, height = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    size = data.draw(st.tuples(st.integers(8, 64), st.integers(8, 64)))
    x, y, x2, y2 = crop_region(spot((width, height), (left, top, right, bottom)), size, data.draw(st.integers(0, 30)))
    assert 0 <= x <= left < right <= x2 <= width
    assert 0 <= y <= top < bottom <= y2 <= height


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_canvas_put_back_is_the_image_outside_the_mask(tmp_path_factory, data):
    """Whatever is painted, and however it is cropped, extended and faded."""
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    levels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 4, size[::-1]) * 85
    levels[0, 0] = 255
    path = tmp_path_factory.mktemp("masks") / "m.png"
    Image.fromarray(levels.astype(np.uint8)).save(path)
    extend = data.draw(st.tuples(*[st.integers(0, 9)] * 4))
    edge, crop = data.draw(st.integers(0, 5)), data.draw(st.none() | st.integers(0, 9))
    mask, image = Mask(file=str(path), extend=extend, edge=edge, crop=crop), picture(*size)
    canvas = requested_canvas(image, mask, None, (16, 24), 8)
    assert all(side % 8 == 0 for side in canvas.pixels.shape[2:])
    assert canvas.mask.shape[2:] == canvas.pixels.shape[2:]
    painted = Image.new("RGB", canvas.pixels.shape[:1:-1], (1, 2, 3))
    whole = np.asarray(canvas.finish(painted))
    left, top, right, bottom = extend
    assert whole.shape == (size[1] + top + bottom, size[0] + left + right, 3)
    inner = whole[top : top + size[1], left : left + size[0]]
    stays = levels == 0
    for side, more in enumerate(extend):  # an extension's edge lies within the image
        if more:
            part = (
                np.s_[:, :edge]
                if side == 0
                else np.s_[:edge]
                if side == 1
                else np.s_[:, max(0, size[0] - edge) :]
                if side == 2
                else np.s_[max(0, size[1] - edge) :]
            )
            stays[part] = False
    assert np.array_equal(inner[stays], np.asarray(image)[stays])


def test_canvases_of_calls_have_the_size_they_are_told():
    canvas = called_canvas(picture(40, 24), spot(), (32, 16), 8)
    assert canvas.pixels.shape == (1, 3, 16, 32)
    assert canvas.mask.shape == (1, 1, 16, 32)
    assert canvas.coarse.shape == (1, 1, 2, 4)
    assert set(canvas.mask.unique().tolist()) == {0.0, 1.0}
