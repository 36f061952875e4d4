"""`--vae`: another VAE on the command line, in replay and in plans, and what is refused."""

from __future__ import annotations

import pytest

import sfumato as library
from support.checkpoints import VAE, XL_VAE, randomize


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("vaes")
    randomize(library.AutoencoderKL(**VAE), 5).save_pretrained(root / "vae")
    randomize(library.AutoencoderKL(**XL_VAE), 6).save_pretrained(root / "xl")
    return root


def test_another_vae_decodes_is_in_the_recipe_and_is_replayed(sfumato_each, files, model, tmp_path):
    draw = ["generate", "cat", "--model", model, "--steps", "2", "--seed", "5", "--vae"]
    done, grid, again, moved, plain, own = sfumato_each(
        [
            [*draw, files / "vae", "-o", "out.png", "--json"],
            [*draw, files / "vae", "-o", "grid.png", "--count", "2", "--grid"],
            ["replay", "out.png", "--json"],
            ["replay", "grid.png", "--json", "--vae", f"{files}/./vae"],
            [*draw[:-1], "-o", "plain.png"],
            ["replay", "plain.png", "--vae", files / "vae"],
        ],
        cwd=tmp_path,
    )
    assert done.succeeded().json["request"]["vae"] == str(files / "vae")
    grid.succeeded()
    assert again.succeeded().json["identical"]
    assert moved.succeeded().json["identical"]
    assert (tmp_path / "out.png").read_bytes() != (tmp_path / plain.succeeded().paths[0].name).read_bytes()
    own.failed(2, "was drawn with the model's own VAE; drop --vae")


def test_replay_wants_the_same_weights(sfumato_each, files, model, tmp_path):
    vae = tmp_path / "vae"
    randomize(library.AutoencoderKL(**VAE), 5).save_pretrained(vae)
    draw = ["generate", "cat", "--model", model, "--steps", "1", "--vae", vae, "-o", "out.png"]
    sfumato_each([draw], cwd=tmp_path)[0].succeeded()
    randomize(library.AutoencoderKL(**VAE), 6).save_pretrained(vae)
    (other,) = sfumato_each([["replay", "out.png"]], cwd=tmp_path)
    other.failed(2, f"the weights of {vae} differ from the recipe's; restore the original file")


def test_plans_count_it(sfumato_each, model, tmp_path):
    plan = ["plan", "cat", "--facts", "m1-8gb", "--json"]
    own, tiny, wrong = sfumato_each(
        [plan, [*plan, "--vae", "built-in/tiny-vae"], [*plan, "--model", model, "--vae", "built-in/tiny-vae"]],
        cwd=tmp_path,
    )
    parts = [one.succeeded().json["model"]["vae"]["parameters"] for one in (own, tiny)]
    assert parts[1] < parts[0] / 5
    wrong.failed(2, "was made for latents of 12 channels, but this checkpoint has 4")


BAD = {
    "is a whole checkpoint, not a VAE": "{model}",
    "xl was made for latents of scale 0.13025, but this checkpoint has 0.18215": "{files}/xl",
    "is a LoRA, not a VAE; give a file with a VAE": "built-in/sketch",
    "is a ControlNetModel, not a VAE": "built-in/edges",
    "there is no built-in/tiny-vea (did you mean 'built-in/tiny-vae'?)": "built-in/tiny-vea",
    "there is no folder ./nowhere": "./nowhere",
    "there is no file nowhere.safetensors": "nowhere.safetensors",
    "pickled.ckpt contains pickled weights": "{files}/pickled.ckpt",
    "vae must be text of 1 to 4096 characters": "",
}


def test_a_bad_vae_is_one_sentence(sfumato_each, files, model, tmp_path):
    (files / "pickled.ckpt").write_bytes(b"\x80\x04.")
    draw = ["generate", "cat", "--model", model, "--steps", "1", "--vae"]
    commands = [[*draw, value.format(model=model, files=files)] for value in BAD.values()]
    for message, outcome in zip(BAD, sfumato_each(commands, cwd=tmp_path), strict=True):
        outcome.failed(2 if "was made for" in message or "characters" in message else 1, message)
    assert list(tmp_path.iterdir()) == []
