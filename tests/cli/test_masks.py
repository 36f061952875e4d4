"""Masks and borders on the command line: painted, replayed, and refused before a model is read."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfumato.images import open_image
from sfumato.metadata.carriers import read_recipe


def write(folder):
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    mask = Image.new("L", (40, 24))
    mask.paste(255, (7, 5, 21, 16))
    mask.save(folder / "mask.png")
    return noise, np.asarray(mask)


def test_paint_extend_and_replay(sfumato_each, model, tmp_path):
    photo, mask = write(tmp_path)
    drawing = ["generate", "the cat", "--model", model, "--steps", "2", "--seed", "3", "--image", "photo.png"]
    commands = [
        [*drawing, "--mask", "mask.png", "--mask-edge", "2", "--mask-crop", "4", "-o", "painted.png"],
        [*drawing, "--extend", "left=8, top=4", "--mask-edge", "0", "-o", "wide.png"],
        ["replay", "painted.png"],
        ["replay", "wide.png"],
    ]
    outcomes = sfumato_each(commands, cwd=tmp_path)
    painted, wide = (np.asarray(open_image(tmp_path / name)) for name in ("painted.png", "wide.png"))
    assert np.array_equal(painted[mask == 0], photo[mask == 0])
    assert (painted[mask > 0] != photo[mask > 0]).any(axis=1).mean() > 0.5
    assert wide.shape == (28, 48, 3)
    assert np.array_equal(wide[4:, 8:], photo)
    assert read_recipe(tmp_path / "wide.png")["request"]["mask"] == {"extend": [8, 4, 0, 0], "edge": 0}
    assert all("identical to the original" in outcome.succeeded().out for outcome in outcomes[2:])


def test_a_changed_mask_is_not_replayed(sfumato_each, model, tmp_path):
    write(tmp_path)
    drawing = ["generate", "the cat", "--model", model, "--steps", "1", "--image", "photo.png", "--mask", "mask.png"]
    sfumato_each([[*drawing, "-o", "painted.png"]], cwd=tmp_path)[0].succeeded()
    Image.new("L", (40, 24), 255).save(tmp_path / "mask.png")
    (outcome,) = sfumato_each([["replay", "painted.png"]], cwd=tmp_path)
    outcome.failed(2, "the mask mask.png is missing or has changed; restore it to replay")
