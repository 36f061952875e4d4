"""Pictures: every form in, PNGs with their recipe out."""

from __future__ import annotations

import errno
import math
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import OutputError, UsageError
from sfumato.images import (
    auto_grid,
    fitted,
    from_pixels,
    make_image_grid,
    open_image,
    psnr,
    to_arrays,
    to_pictures,
    to_pixels,
)
from sfumato.metadata.carriers import read_recipe, save_new_picture, save_picture


def picture(width: int = 16, height: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_survives_the_way_to_pixels_and_back():
    pixels = to_pixels(picture(), 8)
    assert pixels.shape == (1, 3, 8, 16)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert to_pictures(from_pixels(pixels))[0].tobytes() == picture().tobytes()


def test_every_form_means_the_same():
    pixels = to_pixels(picture(), 8)
    array = np.asarray(picture(), dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (array, array[None], tensor, tensor[None], pixels, [picture()], [array], (tensor,)):
        assert torch.allclose(to_pixels(form, 8), pixels, atol=1e-6)
    assert torch.equal(to_pixels([picture(), picture(seed=1)], 8)[1:], to_pixels(picture(seed=1), 8))
    assert np.array_equal(to_arrays(from_pixels(pixels))[0].shape, (8, 16, 3))


def test_sizes_are_brought_to_what_the_model_takes():
    assert to_pixels(picture(19, 11), 8).shape == (1, 3, 8, 16)
    assert to_pixels(picture(3, 3), 8).shape == (1, 3, 8, 8)
    assert to_pixels(picture(), 8, (24, 32)).shape == (1, 3, 32, 24)
    assert to_pixels(picture().convert("L"), 8).shape == (1, 3, 8, 16)
    assert to_pixels(picture().convert("RGBA"), 8).shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("cat.png", "must be a PIL image"),
        ([], "empty list"),
        ([picture(), picture(24, 8)], "differ in size"),
        (np.zeros((8, 8)), "3 channels"),
        (np.zeros((9, 8, 3)), "divisible by 8"),
        (torch.zeros(1, 2, 8, 8), "3 channels"),
        (torch.zeros(1, 3, 8, 12), "divisible by 8"),
    ],
)
def test_what_is_no_picture_is_refused(image, says):
    with pytest.raises(UsageError, match=says):
        to_pixels(image, 8)


def test_an_unreadable_picture(tmp_path):
    with pytest.raises(UsageError, match="check the path"):
        open_image(tmp_path / "none.png")
    picture().save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        (tmp_path / "half.png").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as an image"):
            open_image(tmp_path / "half.png")
    with pytest.raises(UsageError):
        open_image(tmp_path)


def test_a_picture_of_unreasonable_size_is_refused_before_it_is_read(tmp_path, monkeypatch):
    picture(64, 64).save(tmp_path / "large.png")
    monkeypatch.setattr("sfumato.images.MAX_PIXELS", 1000)
    with pytest.raises(UsageError, match="64×64"):
        open_image(tmp_path / "large.png")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_is_not_run_whatever_it_is_called(tmp_path, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(subprocess, "check_call", run)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    for read in (open_image, read_recipe):
        with pytest.raises(UsageError, match="cannot be read as an image"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_that_are_read(tmp_path, kind):
    picture().save(tmp_path / "a", format=kind)
    assert open_image(tmp_path / "a").size == (16, 8)


def test_a_recipe_is_read_from_formats_that_have_room_for_it(tmp_path):
    picture().save(tmp_path / "a.png", format="BMP")
    with pytest.raises(UsageError, match="as the program wrote it"):
        read_recipe(tmp_path / "a.png")


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and devices")
def test_what_is_no_picture_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        for read in (open_image, read_recipe):
            with pytest.raises(UsageError, match="not a regular file"):
                read(tmp_path / name)


def test_a_photo_is_turned_as_it_says(tmp_path):
    upright = picture(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0" + b"\xff" * 40, b"nonsense"])
def test_a_damaged_tag_does_not_cost_the_picture(tmp_path, exif):
    picture().save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").tobytes() == picture().tobytes()


def test_sixteen_bits_are_not_cut_off(tmp_path):
    values = np.full((8, 8), 0x8000, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert {*np.unique(np.asarray(open_image(tmp_path / "a.png")))} == {128}
    assert to_pixels(Image.fromarray(values), 8).mean().item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)
    labels = Image.fromarray(np.full((8, 8), 200, dtype=np.int32))
    assert to_pixels(labels, 8).mean().item() == pytest.approx(200 / 127.5 - 1, abs=1e-6)
    with pytest.raises(UsageError, match="floating-point"):
        to_pixels(Image.new("F", (8, 8)), 8)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and has next to nothing in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [11_000, 20_000, 2**31 - 1])
def test_a_huge_picture_is_one_sentence_and_no_warning(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_of(side, side))
    for read in (open_image, read_recipe):
        with pytest.raises(UsageError, match="pixels; make it smaller first"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text", ['{"request":' * 50_000, '{"request": {}, "a": ' + "[" * 500 + "]" * 500 + "}", "{", "[1]"]
)
def test_a_recipe_that_is_none(tmp_path, text):
    info = PngInfo()
    info.add_itxt("sfumato", text, zip=True)
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UsageError, match=r"a\.png") as caught:
        read_recipe(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), object), np.array("x"), np.zeros((0, 8, 3)),
     torch.zeros(1, 3, 8, 8).long(), torch.zeros(0, 3, 8, 8)],
)  # fmt: skip
def test_numbers_that_are_no_pixels(image):
    with pytest.raises(UsageError, match="image"):
        to_pixels(image, 8)


@pytest.mark.parametrize(("size", "box"), [((8, 8), (4, 0, 12, 8)), ((16, 4), (0, 2, 16, 6)), ((16, 8), (0, 0, 16, 8))])
def test_a_picture_is_cut_around_its_middle(size, box):
    assert fitted(picture(), size).tobytes() == picture().crop(box).tobytes()
    larger = fitted(picture(), (3 * size[0], 3 * size[1]))
    assert larger.tobytes() == picture().crop(box).resize(larger.size, Image.Resampling.LANCZOS).tobytes()


@given(width=st.integers(1, 40), height=st.integers(1, 40), wanted=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_picture_is_cut_to_any_size(width, height, wanted):
    assert fitted(picture(width, height), wanted).size == wanted


def test_a_grid():
    images = [Image.new("RGB", (2, 3), (i, 0, 0)) for i in range(6)]
    grid = make_image_grid(images, rows=2, cols=3)
    assert grid.size == (6, 6)
    assert [grid.getpixel((x, y))[0] for y in (0, 3) for x in (0, 2, 4)] == [0, 1, 2, 3, 4, 5]
    assert make_image_grid(images, 3, 2, resize=8).size == (16, 24)
    with pytest.raises(UsageError, match="needs 4 images, but there are 6"):
        make_image_grid(images, 2, 2)
    with pytest.raises(UsageError):
        make_image_grid([], 0, 0)


def test_a_grid_that_finds_its_own_shape():
    assert auto_grid([picture()]).size == (16, 8)
    assert auto_grid([picture()] * 3).size == (32, 16)
    assert auto_grid([picture()] * 5).size == (48, 16)


recipes = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=4)


@given(more=recipes, prompt=st.text(max_size=40))
def test_a_recipe_survives_the_file(tmp_path_factory, more, prompt):
    recipe = more | {"request": {"prompt": prompt}}
    path = save_picture(picture(), tmp_path_factory.mktemp("png") / "a.png", recipe)
    assert read_recipe(path) == recipe
    assert Image.open(path).tobytes() == picture().tobytes()


def test_a_picture_without_a_recipe(tmp_path):
    save_picture(picture(), tmp_path / "plain.png")
    with pytest.raises(UsageError, match="contains no recipe"):
        read_recipe(tmp_path / "plain.png")
    save_picture(picture(), tmp_path / "other.png", {"request": "text"})
    with pytest.raises(UsageError, match="contains no recipe"):
        read_recipe(tmp_path / "other.png")
    with pytest.raises(UsageError, match="check the path"):
        read_recipe(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "text.png")


def test_no_space_left_leaves_no_half_picture(tmp_path, monkeypatch):
    def full(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="no space left"):
        save_picture(picture(), tmp_path / "deep" / "a.png", {"request": {}})
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_new_picture_replaces_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("the user's")
    (tmp_path / "a-2.png").symlink_to("nowhere")
    assert [save_new_picture(picture(seed=seed), path, {"request": {}}).name for seed in (0, 1)] == [
        "a-3.png",
        "a-4.png",
    ]
    assert path.read_text() == "the user's"
    assert read_recipe(tmp_path / "a-4.png") == {"request": {}}
    assert {one.name for one in tmp_path.iterdir()} == {"a.png", "a-2.png", "a-3.png", "a-4.png"}
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        save_new_picture(picture(), tmp_path / "folder.png")


def test_psnr():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, black) == math.inf
    assert psnr(black, grey) == pytest.approx(10 * math.log10(25))
    with pytest.raises(UsageError, match="cannot be compared"):
        psnr(black, picture())
