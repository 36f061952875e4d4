"""What was made for the built-in model and comes with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato import AdapterFile, AutoencoderTiny, Control, ControlNetModel, EmbeddingFile, GenerateRequest, Mask
from sfumato.checkpoints.builtin import RELATIVES, relatives
from sfumato.errors import CheckpointError, ConfigError, MissingExtra, UsageError
from sfumato.images import psnr
from sfumato.preprocess import prepare

PROMPTS = ("a red apple, 3d", "a house")


@pytest.fixture(scope="module")
def pipe():
    return sfumato.load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny():
    return AutoencoderTiny.from_pretrained("built-in/tiny-vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def asked():
    return GenerateRequest(prompt=PROMPTS, seed=7, steps=8, guidance_scale=3.0)


@pytest.fixture(scope="module")
def plain(pipe, asked):
    return pipe.generate(asked).images


def tensor(images) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


def test_all_are_small():
    names = "edges", "evening", "few-step", "inpaint", "sketch", "tiny-vae"
    assert list(relatives()) == [f"built-in/{name}" for name in names]
    sizes = [file.stat().st_size for file in RELATIVES.rglob("*") if file.is_file()]
    assert 100_000 < sum(sizes) < 5_000_000


def test_the_larger_ones_are_a_package_of_their_own(monkeypatch):
    monkeypatch.setattr("sfumato.checkpoints.builtin.find_spec", lambda name: None)
    assert "built-in/edges" not in relatives()
    with pytest.raises(MissingExtra, match=r"built-in/edges is in a package of its own; .*sfumato\[relatives\]"):
        ControlNetModel.from_pretrained("built-in/edges")
    with pytest.raises(MissingExtra, match="built-in/inpaint"):
        sfumato.load("built-in/inpaint")


def colour(images) -> float:
    """How far from gray the images are: the mean range of a pixel's three values, 0 to 255."""
    return float(np.mean([np.ptp(np.array(image, dtype=float), axis=2).mean() for image in images]))


def test_the_sketch_draws_in_pencil_on_paper(pipe, asked, plain):
    result = pipe.generate(asked.replace(adapters=(AdapterFile(file="built-in/sketch"),)))
    assert result.notes[-1].startswith("built-in/sketch: applied 117 of 117")
    assert colour(result.images) < 25 < colour(plain)
    paper = [np.array(image)[:8].reshape(-1, 3).mean(0) for image in result.images]
    assert all(np.abs(one - (247, 242, 230)).max() < 16 for one in paper)
    assert min(np.array(image, dtype=float).min() for image in result.images) < 120  # and there are lines
    (told,) = result.recipes[0]["request"]["adapters"]
    assert told["file"] == "built-in/sketch"


def detail(image) -> float:
    """The mean step between neighboring pixels."""
    pixels = np.array(image, dtype=float)
    return sum(float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (0, 1))


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_few_steps_come_near_the_whole_model(pipe, asked, plain, steps):
    fast = asked.replace(steps=steps, guidance_scale=1.0, scheduler="lcm")
    few = pipe.generate(fast.replace(adapters=(AdapterFile(file="built-in/few-step"),))).images
    without = pipe.generate(fast).images
    for image, blurred, whole in zip(few, without, plain, strict=True):
        assert psnr(image, whole) > 13
        assert detail(image) > 0.85 * detail(whole) > detail(blurred)


def test_a_draft_comes_near_the_whole_picture(pipe, plain):
    draft = pipe.generate(GenerateRequest(prompt=PROMPTS, seed=7, draft=True))
    assert draft.notes[0].startswith("a draft: 4 steps of lcm with built-in/few-step, decoded by built-in/tiny-vae")
    for image, whole in zip(draft.images, plain, strict=True):
        assert psnr(image, whole) > 13
        assert detail(image) > 0.6 * detail(whole)


def lines(image) -> np.ndarray:
    return np.array(prepare("canny", image))[..., 0] > 0


def near(mask: np.ndarray) -> np.ndarray:
    """The mask, wider by a pixel on all sides."""
    wide = np.pad(mask, 1)
    return np.any([wide[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)], axis=0)


def follows(made: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of lines that may be a pixel off."""
    right, found = (made & near(wanted)).sum() / made.sum(), (wanted & near(made)).sum() / wanted.sum()
    return 2 * right * found / (right + found)


def test_edges_are_followed(pipe, asked, plain, tmp_path):
    for number, image in enumerate(plain):
        image.save(tmp_path / f"{number}.png")
        control = Control(model="built-in/edges", image=str(tmp_path / f"{number}.png"), preprocessor="canny")
        request = asked.replace(prompt=PROMPTS[number], seed=50)
        steered = pipe.generate(request.replace(controls=(control,)))
        free = pipe.generate(request)
        wanted = lines(image)
        assert follows(lines(steered.images[0]), wanted) > 0.6 > follows(lines(free.images[0]), wanted)
        assert steered.recipes[0]["request"]["controls"][0]["model"] == "built-in/edges"


def test_inpainting_leaves_the_rest_and_hides_the_seam(asked, plain, tmp_path):
    photo, hole = plain[1], Image.new("L", plain[1].size)
    ImageDraw.Draw(hole).rectangle((64, 0, 127, 63), fill=255)
    photo.save(tmp_path / "photo.png")
    hole.save(tmp_path / "hole.png")
    painter = sfumato.load("built-in/inpaint", device="cpu", dtype=torch.float32)
    request = asked.replace(image=str(tmp_path / "photo.png"), mask=Mask(file=str(tmp_path / "hole.png")))
    made, before = (
        np.array(one, dtype=float) for one in (painter.generate(request.replace(prompt="a house")).images[0], photo)
    )
    outside = np.array(hole) == 0
    assert (made[outside] == before[outside]).all()
    assert (made != before).any()

    def seam(pixels: np.ndarray) -> float:
        return float(
            np.concatenate(
                [np.abs(pixels[:64, 64] - pixels[:64, 63]), np.abs(pixels[63, 64:] - pixels[64, 64:])]
            ).mean()
        )

    assert seam(made) < seam(before) + 6
    with pytest.raises(UsageError, match="an image and its mask"):
        painter.generate(asked)


def test_the_tiny_autoencoder_decodes_nearly_the_same_images(tiny, asked, plain):
    drafts = sfumato.load(device="cpu", dtype=torch.float32, vae=tiny).generate(asked).images
    assert min(psnr(draft, image) for draft, image in zip(drafts, plain, strict=True)) >= 26


def test_its_encoder_reads_images_for_both_decoders(pipe, tiny, plain):
    x = tensor(plain)
    with torch.no_grad():
        latents = tiny.encode(x).latents
        theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        own = tiny.decode(latents).sample
    for made in (theirs, own):
        error = (made.clamp(-1, 1) - x).square().mean((1, 2, 3))
        assert (10 * torch.log10(4 / error)).min() > 24


def evening(images) -> list[float]:
    """The share of each image's border that has a colour between the word's purple and its orange."""
    purple, orange = np.array([92, 41, 128]), np.array([255, 143, 51])
    shares = []
    for pixels in (np.array(image, dtype=float) for image in images):
        border = np.concatenate(
            [pixels[:4].reshape(-1, 3), pixels[:, :4].reshape(-1, 3), pixels[:, -4:].reshape(-1, 3)]
        )
        place = ((border - purple) @ (orange - purple) / ((orange - purple) ** 2).sum()).clip(0, 1)
        apart = np.linalg.norm(border - purple - place[:, None] * (orange - purple), axis=1)
        shares.append(float((apart < 60).mean()))
    return shares


def test_the_word_paints_an_evening_and_leaves_the_thing(pipe, asked, plain):
    request = asked.replace(prompt=tuple(f"{prompt}, evening" for prompt in PROMPTS))
    result = pipe.generate(request.replace(embeddings=(EmbeddingFile(file="built-in/evening"),)))
    assert max(evening(plain)) < 0.1
    assert min(evening(result.images)) > 0.6
    apple = np.array(result.images[0], dtype=float)[40:88, 40:88].mean((0, 1))
    assert apple[0] > 1.5 * max(apple[1], apple[2])
    (told,) = result.recipes[0]["request"]["embeddings"]
    assert told["file"] == "built-in/evening"  # the same on every machine
    assert len(told["sha256"]) == 64


def test_a_pipeline_that_has_loaded_it_says_so_too(pipe, asked):
    pipe.load_textual_inversion("built-in/evening")
    try:
        told = pipe.generate(asked.replace(prompt="a house, evening", steps=1)).recipes[0]["request"]
    finally:
        pipe.unload_textual_inversion()
    assert [one["file"] for one in told["embeddings"]] == ["built-in/evening"]


def test_a_wrong_name_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=r"no built-in/tiny-vea \(did you mean 'built-in/tiny-vae'"):
        AutoencoderTiny.from_pretrained("built-in/tiny-vea")
    with pytest.raises(CheckpointError, match=r"there are built-in/edges, built-in/evening, .*built-in/tiny-vae"):
        AutoencoderTiny.from_pretrained("built-in/nothing")


def test_a_folder_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built-in" / "tiny-vae").mkdir(parents=True)
    (tmp_path / "built-in" / "tiny-vae" / "config.json").write_text('{"act_fn": "snake"}')
    with pytest.raises(ConfigError, match="snake"):
        AutoencoderTiny.from_pretrained("built-in/tiny-vae")
