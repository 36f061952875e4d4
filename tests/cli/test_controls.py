"""Pictures that steer, on the command line: options, what is kept, replay, and what is refused."""

from __future__ import annotations

import pytest
from PIL import Image

import sfumato as library
from support.control import control_net, control_picture


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """ControlNets of two families, and a photo."""
    root = tmp_path_factory.mktemp("controls")
    control_net(library).save_pretrained(root / "net")
    control_net(library, "sdxl").save_pretrained(root / "xl")
    control_picture(32, 16).save(root / "photo.png")
    return root


def test_a_picture_steers_is_kept_and_replayed(sfumato_each, files, model, tmp_path):
    photo, net = files / "photo.png", files / "net"
    draw = ["generate", "cat", "--model", model, "--steps", "2", "--seed", "5", "--keep-control"]
    done, again, padded, several = sfumato_each(
        [
            [*draw, "--control", f"canny:{photo}:0.8:0:0.9", "--controlnet", net, "-o", "out.png"],
            ["replay", "out.png", "--json"],
            [*draw, "--control", f"invert:{photo}", "--controlnet", net, "--control-fit", "pad", "--json"],
            [*draw, "--control", f"none:{photo}:0.5", "--control", f"invert:{photo}", "--controlnet", net, "--json"],
        ],
        cwd=tmp_path,
    )
    assert [path.name for path in done.succeeded().paths] == ["out.png", "out.control.png"]
    assert "32 × 16 was cropped to 16 × 16" in done.err
    kept = Image.open(tmp_path / "out.control.png").convert("L")
    assert kept.size == (16, 16)
    assert {value for _, value in kept.getcolors()} == {0, 255}
    assert again.succeeded().json["identical"]
    (control,) = padded.succeeded().json["request"]["controls"]
    assert control == {"model": str(net), "image": str(photo), "preprocessor": "invert", "fit": "pad"}
    assert len(padded.json["controls"]) == 1
    # One network reads several pictures, which the plan counts as well.
    assert [one.get("scale", 1) for one in several.succeeded().json["request"]["controls"]] == [0.5, 1]
    assert len(several.json["controls"]) == 2


BAD = {
    "there is no kind 'cany' (did you mean 'canny'?)": ["--control", "cany:{photo}", "--controlnet", "{net}"],
    "KIND:IMAGE[:SCALE[:START[:END]]]": ["--control", "{photo}", "--controlnet", "{net}"],
    "and 'strong' is not a number": ["--control", "canny:{photo}:strong", "--controlnet", "{net}"],
    "start, 0.9, must be below its end, 0.5": ["--control", "canny:{photo}:1:0.9:0.5", "--controlnet", "{net}"],
    "got 3 --control and 2 --controlnet": ["--control", "canny:{photo}"] * 3 + ["--controlnet", "{net}"] * 2,
    "got 0 --control and 1 --controlnet": ["--controlnet", "{net}"],
    "there is no image nowhere.png": ["--control", "canny:nowhere.png:0.5", "--controlnet", "{net}"],
    "fit must be crop, pad or stretch": ["--control", "canny:{photo}", "--controlnet", "{net}", "--control-fit", "squeeze"],
    "was made for Stable Diffusion XL": ["--control", "canny:{photo}", "--controlnet", "{xl}"],
    "is a whole checkpoint, not a ControlNet": ["--control", "canny:{photo}", "--controlnet", "{model}"],
    "is one ControlNetModel, not a whole checkpoint": ["--model", "{net}"],
    "there is no folder ./nowhere": ["--control", "canny:{photo}", "--controlnet", "./nowhere"],
}  # fmt: skip


def test_bad_controls_are_one_sentence(sfumato_each, files, model, tmp_path):
    names = {"photo": files / "photo.png", "net": files / "net", "xl": files / "xl", "model": model}
    draw = ["generate", "cat", "--model", model, "--steps", "1"]
    commands = [[*draw, *(option.format(**names) for option in options)] for options in BAD.values()]
    for message, outcome in zip(BAD, sfumato_each(commands, cwd=tmp_path), strict=True):
        outcome.failed(1 if "checkpoint" in message or "folder" in message else 2, message)
    assert list(tmp_path.iterdir()) == []


def test_image_prompts_on_the_command_line(sfumato_each, files, model, tmp_path):
    draw = ["generate", "cat", "--model", model, "--steps", "1"]
    photo = files / "photo.png"
    alone, nowhere, number = sfumato_each(
        [
            [*draw, "--image-prompt", photo, "--ip-adapter", "ip.safetensors"],
            [*draw, "--image-prompt", photo, "--ip-adapter", "ip.safetensors", "--image-encoder", "./nowhere"],
            [*draw, "--image-prompt", f"{photo}:much", "--ip-adapter", "ip.safetensors", "--image-encoder", "enc"],
        ],
        cwd=tmp_path,
    )
    alone.failed(2, "--ip-adapter and --image-encoder go together")
    nowhere.failed(1, "nowhere")
    number.failed(2, "--image-prompt takes IMAGE[:SCALE], and 'much' is not a number")
    assert list(tmp_path.iterdir()) == []


def test_plans_count_controls_and_masks(sfumato_each, files, model, tmp_path):
    photo = files / "photo.png"
    plain, steered, from_image = sfumato_each(
        [
            ["plan", "cat", "--model", model, "--json", "--facts", "m1-8gb"],
            [
                "plan",
                "cat",
                "--model",
                model,
                "--json",
                "--facts",
                "m1-8gb",
                "--control",
                f"canny:{photo}",
                "--controlnet",
                files / "net",
            ],
            [
                "plan",
                "cat",
                "--model",
                model,
                "--json",
                "--facts",
                "m1-8gb",
                "--image",
                photo,
                "--strength",
                "0.5",
                "--extend",
                "left=32",
            ],
        ],
        cwd=tmp_path,
    )
    counts = [one.succeeded().json["model"]["unet"]["parameters"] for one in (plain, steered, from_image)]
    assert counts[0] == counts[2] < counts[1]
    assert plain.json["plan"]["seconds"] < steered.json["plan"]["seconds"]
