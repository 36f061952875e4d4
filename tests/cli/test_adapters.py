"""`--lora` and `--embedding`: what is applied is said, repeated by the recipe, and refused in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sfumato as library
from sfumato.adapters.named import hash_of_weights
from sfumato.metadata.carriers import read_recipe
from support.adapters import kohya, random_lora


@pytest.fixture
def files(model, tmp_path):
    pipe = library.DiffusionPipeline.from_pretrained(model)
    save_file(kohya(random_lora(pipe.parts.adaptable)), tmp_path / "style.safetensors", {"ss_output_name": "Fog"})
    save_file({"emb_params": torch.randn(2, pipe.text_encoder.config.hidden_size)}, tmp_path / "toy.safetensors")
    return tmp_path


def test_adapters_and_embeddings_from_the_command_line(sfumato_each, model, files):
    draw = ["generate", "a photo of toy", "--model", model, "--steps", "1", "--seed", "7", "--output"]
    lora = ["--lora", "style.safetensors:0.5:-1", "--embedding", "toy.safetensors"]
    plain, worn, shown, again, grid, grid_again = sfumato_each(
        [
            [*draw, "plain.png"],
            [*draw, "worn.png", *lora],
            ["show", "style.safetensors"],
            ["replay", "worn.png"],
            [*draw, "grid.png", *lora, "--count", "2", "--grid"],
            ["replay", "grid.png"],
        ],
        cwd=files,
    )
    plain.succeeded()
    number = len(random_lora(library.DiffusionPipeline.from_pretrained(model).parts.adaptable))
    assert f"style.safetensors: applied {number} of {number}" in worn.succeeded().err
    assert (files / "plain.png").read_bytes() != (files / "worn.png").read_bytes()
    recipe = read_recipe(files / "worn.png")
    assert recipe["model"] == read_recipe(files / "plain.png")["model"]  # the checkpoint's own weights
    (told,) = recipe["request"]["adapters"]
    assert (told["weight"], told["text_weight"], len(told["sha256"])) == (0.5, -1, 64)
    assert "trained as Fog" in shown.succeeded().out
    for replayed in (again, grid_again):
        assert "identical to the original" in replayed.succeeded().out
    grid.succeeded()


def test_adapters_that_a_prompt_names(sfumato_each, model, files):
    draw = ["generate", "--model", model, "--steps", "1", "--seed", "7", "--output"]
    (files / "folder").mkdir()
    shutil.move(files / "style.safetensors", files / "folder")
    named, folder = "a fox<lora:fog:0.5:-1>", ["--lora-dir", "folder"]
    said, by_name, without, none, again = sfumato_each(
        [
            [*draw, "said.png", "a fox", "--lora", "folder/style.safetensors:-1:0.5"],
            [*draw, "by-name.png", named, *folder],
            [*draw, "without.png", named],
            [*draw, "none.png", "a fox <lora:mist:1>", *folder],
            ["replay", "by-name.png"],
        ],
        cwd=files,
    )
    said.succeeded()
    by_name.succeeded()
    assert read_recipe(files / "said.png")["request"] == read_recipe(files / "by-name.png")["request"]
    assert (files / "said.png").read_bytes() == (files / "by-name.png").read_bytes()
    assert "<lora:fog:0.5:-1> in the prompt is ignored; load adapters with --lora" in without.succeeded().err
    none.failed(2, "there is no adapter 'mist' in folder; found style")
    assert "identical to the original" in again.succeeded().out


def test_a_picture_of_another_program_names_adapters(sfumato_each, model, files):
    text = "a fox <lora:style:0.5>\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 7, Size: 64x64"
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(files / "theirs.png", pnginfo=info)
    replay = ["replay", "theirs.png", "--model", model, "--output"]
    # The same file under another name, and a file of the name that is another.
    (files / "renamed").mkdir()
    shutil.copy(files / "style.safetensors", files / "renamed" / "a.safetensors")
    number = hash_of_weights(files / "style.safetensors")[:12]
    for name, hashes in (("same", f"style: {number}"), ("other", "style: 0123456789ab")):
        info = PngInfo()
        info.add_text("parameters", f'{text}, Lora hashes: "{hashes}"')
        Image.new("RGB", (64, 64)).save(files / f"{name}.png", pnginfo=info)
    hashed = ["replay", "same.png", "--model", model, "--lora-dir", "renamed", "--output", "hashed.png", "--json"]
    another = ["replay", "other.png", "--model", model, "--lora-dir", ".", "--output", "another.png", "--json"]
    with_it, without, same, other = sfumato_each(
        [[*replay, "with.png", "--lora-dir", "."], [*replay, "without.png"], hashed, another], cwd=files
    )
    assert same.succeeded().json["not_honoured"] == []
    assert read_recipe(files / "hashed.png")["request"]["adapters"][0]["file"] == "renamed/a.safetensors"
    (note,) = other.succeeded().json["not_honoured"]
    assert note == "style.safetensors has none of the hashes that the image names; it may be another adapter"
    assert "applied" in with_it.succeeded().err
    assert "<lora:style:0.5> in the prompt is ignored" in without.succeeded().err
    (told,) = read_recipe(files / "with.png")["request"]["adapters"]
    assert (told["file"], told["weight"]) == ("style.safetensors", 0.5)


def test_bad_adapters_are_one_sentence(sfumato_each, model, files):
    shutil.copy(files / "style.safetensors", files / "torn.safetensors")
    with (files / "torn.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    torch.save({}, files / "style.pt")
    other = {f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_{part}.weight": torch.zeros(shape) for part, shape in (("down", (2, 2048)), ("up", (16, 2)))}  # fmt: skip
    save_file(other, files / "xl.safetensors")
    draw = ["generate", "fog", "--model", model, "--steps", "1", "--output", "no.png"]
    wrong = {
        "style.safetensors:much": (2, "'much' is not a number"),
        "style.safetensors:nan": (2, "weight must be a number"),
        "none.safetensors": (1, "none.safetensors is missing"),
        "torn.safetensors": (1, "truncated"),
        "style.pt": (1, "can run code"),
        "xl.safetensors": (1, "made for Stable Diffusion XL"),
    }
    outcomes = sfumato_each([[*draw, "--lora", one] for one in wrong], cwd=files)
    for outcome, (code, words) in zip(outcomes, wrong.values(), strict=True):
        outcome.failed(code, words)
    assert not Path(files / "no.png").exists()


def test_a_file_that_moved_is_repeated_from_a_folder(sfumato_each, model, files):
    draw = ["generate", "fog", "--model", model, "--steps", "1", "--output", "a.png", "--lora", "style.safetensors"]
    (drawn,) = sfumato_each([draw], cwd=files)
    drawn.succeeded()
    with Image.open(files / "a.png") as image:
        assert image.text["parameters"].startswith("fog <lora:style:1>\n")
    (files / "folder").mkdir()
    shutil.move(files / "style.safetensors", files / "folder" / "other-name.safetensors")
    gone, found = sfumato_each([["replay", "a.png"], ["replay", "a.png", "--lora-dir", "folder"]], cwd=files)
    gone.failed(1, "style.safetensors is missing")
    assert "identical to the original" in found.succeeded().out


def test_a_changed_file_is_not_repeated(sfumato_each, model, files):
    draw = ["generate", "fog", "--model", model, "--steps", "1", "--output", "a.png", "--lora", "style.safetensors"]
    (drawn,) = sfumato_each([draw], cwd=files)
    drawn.succeeded()
    save_file({"lora_unet_conv_in.diff_b": torch.ones(16)}, files / "style.safetensors")
    (changed,) = sfumato_each([["replay", "a.png"]], cwd=files)
    changed.failed(2, "style.safetensors is not the file")
