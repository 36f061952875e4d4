"""Checkpoints in one file on the command line: drawn with their own defaults, replayed, converted, refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.single_files import write_small

UNET = "model.diffusion_model."
# name of the file: family, what its U-Net has beside; and the steps, guidance, scheduler and prediction to draw with.
FILES = {
    "sd15.safetensors": (("sd15", {}), (50, 7.5, "PNDMScheduler", "epsilon")),
    "v2-1.safetensors": (("sd21", {}), (50, 7.5, "DDIMScheduler", "v_prediction")),
    "xl.safetensors": (("sdxl", {}), (50, 5.0, "EulerDiscreteScheduler", "epsilon")),
    "sd_xl_turbo_1.0.safetensors": (("sdxl-turbo", {}), (1, 0.0, "EulerAncestralDiscreteScheduler", "epsilon")),
    "lcm.safetensors": (("sd15", {"time_cond_proj_dim": 256}), (4, 8.5, "LCMScheduler", "epsilon")),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of small files, one of each kind."""
    root = tmp_path_factory.mktemp("files")
    for name, ((family, unet), _) in FILES.items():
        write_small(root / name, family, **unet)
    write_small(root / "pruned.safetensors", "ssd-1b")
    return root


def test_files_and_folders_draw_with_their_own_defaults(sfumato_each, files):
    expected = {name: told for name, (_, told) in FILES.items()}
    expected |= {"sdxl": expected["xl.safetensors"], "SSD-1B": expected["xl.safetensors"]}
    commands = [["convert", "xl.safetensors", "sdxl"], ["convert", "pruned.safetensors", "SSD-1B"]]
    commands += [
        ["generate", "a fox", "--model", name, "--seed", 3, "--json", "-o", f"{name}.png"] for name in expected
    ]
    commands += [["replay", f"{name}.png", "--json"] for name in expected]
    outcomes = sfumato_each(commands, cwd=files)
    assert [done.succeeded().out.strip() for done in outcomes[:2]] == ["sdxl", "SSD-1B"]
    for (name, (steps, guidance, scheduler, prediction)), done in zip(expected.items(), outcomes[2:], strict=False):
        recipe, request = (done.succeeded().json[key] for key in ("recipe", "request"))
        assert (request["steps"], request["guidance_scale"]) == (steps, guidance), name
        assert (request["width"], request["height"]) == (16, 16), name
        assert recipe["scheduler"]["class"] == scheduler, name
        assert recipe["scheduler"]["config"]["prediction_type"] == prediction, name
        assert recipe["model"]["name"] == name
    for done in outcomes[2 + len(expected) :]:
        assert done.succeeded().json["identical"]
    pictures = [done.json["images"] for done in outcomes[2 : 2 + len(expected)]]
    assert pictures == [[f"{name}.png"] for name in expected]


def test_what_is_said_of_a_file_goes_before_what_it_says(sfumato_each, files, tmp_path):
    said = ["--family", "sd21", "--prediction-type", "sample", "--steps", 2]
    state = {key: value for key, value in load_file(files / "xl.safetensors").items() if key.startswith(UNET)}
    save_file(state, tmp_path / "bare.safetensors", {"modelspec.resolution": "64x64"})
    v2, bare, folder = files / "v2-1.safetensors", tmp_path / "bare.safetensors", tmp_path / "xl"
    commands = [
        ["generate", "a fox", "--model", v2, *said, "--json", "-o", "a.png"],
        ["replay", "a.png", "--json"],
        ["convert", files / "xl.safetensors", folder, "--dtype", "bfloat16"],
        ["generate", "a fox", "--model", bare, "--config", folder, "--steps", 2, "--json", "-o", "b.png"],
        ["replay", "b.png", "--json"],
        ["convert", bare, "again.safetensors", "--config", folder],
        ["show", "again.safetensors", "--json"],
        ["plan", "a fox", "--model", "again.safetensors", "--json"],
        ["generate", "a fox", "--model", folder, "--family", "sdxl"],
        ["generate", "a fox", "--model", v2, "--family", "sd12"],
        ["generate", "a fox", "--model", v2, "--prediction-type", "noise"],
        ["generate", "a fox", "--model", bare],
        ["plan", "a fox", "--model", bare],
        ["generate", "a fox", "--model", v2, "--variant", "fp16"],
        ["convert", v2, "again.safetensors"],
        ["convert", v2, tmp_path],
        ["bench", "--model", v2, "--peers", "diffusers"],
    ]
    told, again, _, filled, filled_again, _, shown, planned, *failures = sfumato_each(commands, cwd=tmp_path)
    recipe = told.succeeded().json["recipe"]
    assert recipe["scheduler"]["config"]["prediction_type"] == "sample"
    assert recipe["model"]["options"] == {"family": "sd21", "prediction_type": "sample"}
    assert "is assumed to predict sample, as requested; detected: v_prediction" in told.err
    assert again.succeeded().json["identical"]
    assert filled.succeeded().json["recipe"]["model"]["options"] == {"config": str(folder)}
    assert filled_again.succeeded().json["identical"]
    facts = shown.succeeded().json
    assert set(facts["parts"]) == {"unet", "vae", "text_encoder", "text_encoder_2", "scheduler"}
    assert facts["missing"] == {}
    assert planned.succeeded().json["plan"]["steps"] == 50
    sentences = (
        (2, "family applies only to single files"),
        (2, "there is no family 'sd12' (did you mean"),
        (2, "prediction_type must be epsilon, v_prediction or sample"),
        (1, "the file has no VAE; pass one with vae=…", "--config", "it also lacks text_encoder and text_encoder_2"),
        (1, "the file has no VAE"),
        (2, "has no variants"),
        (2, "again.safetensors already exists", "--overwrite"),
    )
    for done, sentence in zip(failures, sentences, strict=False):
        done.failed(*sentence)
    assert failures[-2].succeeded().paths == [tmp_path]  # other files may be where a folder is written
    failures[-1].failed(2, "need a folder; run 'sfumato convert")


WRONG = {
    "a LoRA": {"lora_unet_mid_block.lora_down.weight": (2, 2)},
    "an autoencoder (VAE)": {"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "a Flux model": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "a Stable Diffusion 3 model": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (8, 8)},
    "of a kind that is not known": {"zebra": (2,)},
}


def test_files_that_cannot_be_drawn(sfumato_each, files, tmp_path):
    for number, tensors in enumerate(WRONG.values()):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / f"{number}.safetensors")
    state = load_file(files / "sd15.safetensors")
    metadata = {"modelspec.resolution": "64x64"}
    save_file(state | {f"{UNET}input_blocks.1.0.zebra": torch.zeros(2)}, tmp_path / "mixed.safetensors", metadata)
    key = f"{UNET}middle_block.1.norm.bias"
    save_file({name: value for name, value in state.items() if name != key}, tmp_path / "short.safetensors", metadata)
    (tmp_path / "torn.safetensors").write_bytes((files / "sd15.safetensors").read_bytes()[:-1])
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    write_small(tmp_path / "paint.safetensors", "sdxl-inpainting")
    # Of another autoencoder, with twice the channels.
    save_file(state, tmp_path / "odd.safetensors", metadata)
    vae = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("first_stage_model.")}
    vae |= {"decoder.conv_in.weight": vae["decoder.conv_in.weight"].repeat(1, 2, 1, 1)}
    save_file(vae, tmp_path / "odd.vae.safetensors")
    names = [*map(str, range(len(WRONG))), "mixed", "short", "torn", "paint", "odd", "none"]
    commands = [["generate", "a fox", "--model", f"{name}.safetensors", "-o", "x.png"] for name in names]
    commands += [["generate", "a fox", "--model", "old.ckpt"], ["convert", "0.safetensors", "folder"]]
    commands += [["convert", "old.ckpt", "new.safetensors"], ["convert", "old.ckpt", "new.safetensors", "--pickle"]]
    outcomes = sfumato_each(commands, cwd=tmp_path)
    for kind, done in zip(WRONG, outcomes, strict=False):
        done.failed(1, f"safetensors is {kind}, not a checkpoint (it has", "give a file with a U-Net")
    mixed, short, torn, paint, odd, none, pickled, adapter, refused, made = outcomes[len(WRONG) :]
    mixed.failed(1, "mixed.safetensors: unet: 1 weight that Stable Diffusion 1.x does not have", "zebra", "family=")
    short.failed(1, "short.safetensors: unet: 1 weight missing", key)
    torn.failed(1, "torn.safetensors is truncated", "download or copy it again")
    paint.failed(2, "Stable Diffusion XL inpainting needs mask and masked image latents", "pass an image and its mask")
    assert "odd.vae.safetensors" in odd.err
    assert odd.code == 1
    none.failed(1, "there is no file none.safetensors")
    pickled.failed(1, "pickled weights", "sfumato convert old.ckpt old.safetensors --pickle")
    adapter.failed(1, "a LoRA, not a checkpoint")
    refused.failed(1, "pickled weights")
    assert made.succeeded().out.strip() == "new.safetensors"
    assert load_file(tmp_path / "new.safetensors").keys() == state.keys()
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "folder").exists()


def test_a_file_becomes_core_ml(sfumato_each, files, tmp_path):
    """Apple's networks from a file, proved against it."""
    command = [
        "coreml",
        "convert",
        files / "sd15.safetensors",
        "--convert-vae-decoder",
        "-o",
        tmp_path / "made",
        "--json",
    ]
    done, other = sfumato_each([command, ["coreml", "convert", files / "xl.safetensors"]], cwd=tmp_path)
    assert json.loads(done.succeeded().out)["parts"][0]["part"] == "vae_decoder"
    other.failed(1, "xl.safetensors: only checkpoints with one text encoder can be converted")
