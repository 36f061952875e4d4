"""What was made for the built-in model and comes with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sfumato
from sfumato import AutoencoderTiny, GenerateRequest
from sfumato.checkpoints.builtin import RELATIVES, relatives
from sfumato.errors import CheckpointError, ConfigError
from sfumato.images import psnr

PROMPTS = ("a red apple, 3d", "a penguin, flat style", "a house")


@pytest.fixture(scope="module")
def pipe():
    return sfumato.load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny():
    return AutoencoderTiny.from_pretrained("built-in/tiny-vae")


@pytest.fixture(scope="module")
def asked():
    return GenerateRequest(prompt=PROMPTS, seed=7, steps=10, guidance_scale=3.0)


@pytest.fixture(scope="module")
def plain(pipe, asked):
    return pipe.generate(asked).images


def tensor(images) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


def test_all_are_small():
    assert "built-in/tiny-vae" in relatives()
    sizes = [file.stat().st_size for file in RELATIVES.rglob("*") if file.is_file()]
    assert 100_000 < sum(sizes) < 1_500_000


def test_the_tiny_autoencoder_decodes_nearly_the_same_images(pipe, tiny, asked, plain):
    drafts = sfumato.load(device="cpu", dtype=torch.float32, vae=tiny).generate(asked).images
    assert min(psnr(draft, image) for draft, image in zip(drafts, plain, strict=True)) >= 26
    count = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (tiny, pipe.vae)]
    assert 15 * count[0] < count[1]


def test_its_encoder_reads_images_for_both_decoders(pipe, tiny, plain):
    x = tensor(plain)
    with torch.no_grad():
        latents = tiny.encode(x).latents
        theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        own = tiny.decode(latents).sample
    for made in (theirs, own):
        error = (made.clamp(-1, 1) - x).square().mean((1, 2, 3))
        assert (10 * torch.log10(4 / error)).min() > 24


def test_a_wrong_name_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=r"no built-in/tiny-vea \(did you mean 'built-in/tiny-vae'"):
        AutoencoderTiny.from_pretrained("built-in/tiny-vea")
    with pytest.raises(CheckpointError, match=r"there are .*built-in/tiny-vae"):
        AutoencoderTiny.from_pretrained("built-in/nothing")


def test_a_folder_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built-in" / "tiny-vae").mkdir(parents=True)
    (tmp_path / "built-in" / "tiny-vae" / "config.json").write_text('{"act_fn": "snake"}')
    with pytest.raises(ConfigError, match="snake"):
        AutoencoderTiny.from_pretrained("built-in/tiny-vae")
