"""What was made for the built-in model and comes with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sfumato
from sfumato import AutoencoderTiny, EmbeddingFile, GenerateRequest
from sfumato.checkpoints.builtin import RELATIVES, relatives
from sfumato.errors import CheckpointError, ConfigError
from sfumato.images import psnr

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
    assert {"built-in/tiny-vae", "built-in/evening"} <= set(relatives())
    sizes = [file.stat().st_size for file in RELATIVES.rglob("*") if file.is_file()]
    assert 100_000 < sum(sizes) < 1_500_000


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
    with pytest.raises(CheckpointError, match=r"there are .*built-in/evening, built-in/tiny-vae"):
        AutoencoderTiny.from_pretrained("built-in/nothing")


def test_a_folder_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built-in" / "tiny-vae").mkdir(parents=True)
    (tmp_path / "built-in" / "tiny-vae" / "config.json").write_text('{"act_fn": "snake"}')
    with pytest.raises(ConfigError, match="snake"):
        AutoencoderTiny.from_pretrained("built-in/tiny-vae")
