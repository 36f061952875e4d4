"""The model that comes with the package, and its relatives, are like any others: the reference reads them and draws the
same.
"""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.checkpoints.builtin import builtin_model, relatives
from sfumato.preprocess import prepare
from support.compare import generator

PROMPT = "a red apple, 3d"
USUAL = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "np"}
LIBRARIES = (sfumato, diffusers)


def drawn(pipe, **call) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, **({"generator": generator(7)} | USUAL | call)).images[0]


def check_equal(pictures) -> None:
    """Equal but for the last bit or two of 8."""
    assert pictures[0].shape == (128, 128, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 2 / 255


def whole(library, name="StableDiffusionPipeline", **parts):
    return getattr(library, name).from_pretrained(builtin_model(), torch_dtype=torch.float32, **parts)


@pytest.fixture(scope="module")
def plain():
    return drawn(whole(sfumato))


def test_the_reference_draws_the_same_picture(plain):
    check_equal([plain, drawn(whole(diffusers))])


@pytest.mark.parametrize(
    ("name", "call"), [("sketch", {}), ("few-step", {"num_inference_steps": 4, "guidance_scale": 1.0})]
)
def test_its_loras_change_both_alike(name, call, plain):
    pictures = []
    for library in LIBRARIES:
        pipe = whole(library)
        pipe.load_lora_weights(str(relatives()[f"built-in/{name}"]))
        if call:
            pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
        pictures.append(drawn(pipe, **call))
    check_equal(pictures)
    assert np.abs(pictures[0] - plain).mean() > 0.01


def image_of(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def test_its_controlnet_guides_both_alike(plain):
    edges, pictures = prepare("canny", image_of(plain)), []
    for library in LIBRARIES:
        net = library.ControlNetModel.from_pretrained(relatives()["built-in/edges"], torch_dtype=torch.float32)
        pipe = whole(library, "StableDiffusionControlNetPipeline", controlnet=net)
        pictures.append(drawn(pipe, image=edges, generator=generator(8)))
    check_equal(pictures)


def test_its_inpainting_form_predicts_alike():
    """The reference's pipeline knows latents of four channels only, so its U-Net is what can be compared."""
    draw = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 25, 16, 16, generator=draw), torch.randn(2, 24, 192, generator=draw)
    with torch.no_grad():
        ours, theirs = (
            library.UNet2DConditionModel.from_pretrained(
                relatives()["built-in/inpaint"], subfolder="unet", torch_dtype=torch.float32
            )(x, torch.tensor([900, 100]), words)[0]
            for library in LIBRARIES
        )
    assert ours.shape == (2, 12, 16, 16)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_the_packages_stay_small_and_say_where_their_art_is_from():
    folder = builtin_model()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 35_000_000
    for place in (folder, relatives()["built-in/edges"].parent):
        notice = (place / "NOTICE").read_text(encoding="utf-8")
        for licence in ("MIT", "Apache-2.0", "CC-BY-4.0"):
            assert licence in notice
