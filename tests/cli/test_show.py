"""`sfumato show`: the truth about a checkpoint, from its headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import sfumato as library
from sfumato.checkpoints.write_file import write_single_file
from support.single_files import TINY, parts_of

PARTS = ("text_encoder", "unet", "vae")
UNET = "unet/diffusion_pytorch_model.safetensors"


def blow_up(path: Path, factor: int) -> int:
    """Say in the header that one tensor is `factor` times as long, and put a hole there; returns its new size."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["conv_in.bias"]
    start = len(content) - 8 - length
    size = factor * 4
    header["conv_in.bias"] = entry | {"shape": [factor], "data_offsets": [start, start + size]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + content[8 + length :])
        stream.truncate(8 + len(text) + start + size)
    return size


def test_numbers_are_the_models_own(sfumato_each, model, tmp_path):
    huge, torn = Path(shutil.copytree(model, tmp_path / "huge")), Path(shutil.copytree(model, tmp_path / "torn"))
    size = blow_up(huge / UNET, 10**10)  # forty gigabytes, none of which may be read
    with (torn / UNET).open("r+b") as stream:
        stream.truncate((torn / UNET).stat().st_size - 1)
    weird = tmp_path / "[bold]weird"
    shutil.copytree(model, weird)
    commands = [["show", model, "--json"], ["show", model], ["show", huge, "--json"], ["show", weird]]
    bad = [
        ["show", torn],
        ["show", tmp_path / "none"],
        ["show", "nobody/nothing"],
        ["show", model, "--variant", "fp16"],
    ]
    told, text, large, odd, *failures = sfumato_each([*commands, *bad], cwd=tmp_path)

    facts = told.succeeded().json
    pipe = library.DiffusionPipeline.from_pretrained(model)
    total = 0
    for part in PARTS:
        parameters = list(getattr(pipe, part).parameters())
        entry = facts["parts"][part]
        assert entry["class"] == type(getattr(pipe, part)).__name__
        assert entry["parameters"] == sum(parameter.numel() for parameter in parameters)
        assert entry["bytes"] == sum(parameter.nbytes for parameter in parameters)
        assert entry["dtype"] == "float32"
        total += entry["parameters"]
    assert facts["parameters"] == total
    assert facts["bytes"] == 4 * total
    assert facts["parts"]["scheduler"]["class"] == "PNDMScheduler"
    assert (facts["width"], facts["height"], facts["prediction_type"], facts["prompt_tokens"]) == (
        16,
        16,
        "epsilon",
        20,
    )
    for word in (
        "UNet2DConditionModel",
        "PNDMScheduler",
        "float32",
        "16 × 16",
        "predicts epsilon, 20 prompt tokens",
        str(model),
    ):
        assert word in text.succeeded().out
    assert large.succeeded().json["parts"]["unet"]["bytes"] > size
    assert "[bold]weird" in odd.succeeded().out

    failures[0].failed(1, str(torn / UNET), "truncated", "download or copy it again")
    failures[1].failed(1, "there is no folder", "give an existing folder or a hub id")
    failures[2].failed(1, "'nobody/nothing' is not completely in the local cache", "sfumato download nobody/nothing")
    failures[3].failed(1, "variant 'fp16'")


def test_a_file_says_what_it_is_and_why(sfumato_each, tmp_path):
    tiny = TINY["sdxl"]
    checkpoint, adapter, torn = tmp_path / "my model.safetensors", tmp_path / "style.safetensors", tmp_path / "torn.safetensors"  # fmt: skip
    parts = parts_of(tiny)
    del parts["text_encoder"]
    write_single_file(checkpoint, replace(tiny.row, encoders=tiny.row.encoders[1:]), parts, {"prediction_type": "v_prediction"})  # fmt: skip
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(2, 2, dtype=torch.float16)}, adapter)
    torn.write_bytes(checkpoint.read_bytes()[:-1])
    commands = [["show", checkpoint, "--json"], ["show", checkpoint], ["show", adapter], ["show", adapter, "--json"]]
    commands += [["show", torn], ["show", checkpoint, "--variant", "fp16"], ["show", "none.safetensors"]]
    told, text, other, other_told, *failures = sfumato_each(commands, cwd=tmp_path)

    facts = told.succeeded().json
    assert facts["family"] == "Stable Diffusion XL refiner"
    assert facts["prediction_type"] == "v_prediction"
    assert facts["suggested"] == {"steps": 50, "guidance_scale": 5.0}
    assert facts["parts"]["unet"]["parameters"] == sum(value.numel() for value in parts["unet"].parameters())
    assert facts["bytes"] == sum(value.nbytes for part in parts.values() for value in part.parameters())
    for words in (
        "my model.safetensors",
        "Stable Diffusion XL refiner",
        "- predicts v_prediction: according to its metadata",
    ):
        assert words in text.succeeded().out
    assert "style.safetensors: a LoRA" in other.succeeded().out
    assert other_told.succeeded().json["parts"]["all"]["dtype"] == "float16"
    failures[0].failed(1, "torn.safetensors is truncated", "download or copy it again")
    failures[1].failed(2, "a checkpoint file has no variants")
    failures[2].failed(1, "there is no file none.safetensors")


def test_what_was_made_for_the_built_in_model_is_shown_by_its_name(sfumato_each, tmp_path):
    names = "edges", "inpaint", "sketch", "evening", "tiny-vae"
    shown = [
        one.succeeded().out for one in sfumato_each([["show", f"built-in/{name}"] for name in names], cwd=tmp_path)
    ]
    for name, out in zip(names, shown, strict=True):
        assert out.startswith(f"built-in/{name}: ")
    edges, inpaint, sketch, evening, tiny = shown
    assert "a network (ControlNetModel), 4.3 M parameters, 9 MB, float16" in edges
    assert "images of 128 × 128" in inpaint
    assert "LoRA × 99, LoCon × 18, rank 4" in sketch
    assert "6 vectors" in evening
    assert "AutoencoderTiny" in tiny


def test_a_file_is_shown_at_once(environment, tmp_path):
    """Without torch, and so in a fraction of a second."""
    write_single_file(tmp_path / "tiny.safetensors", TINY["sd15"].row, parts_of(TINY["sd15"]), {})
    code = """
import sys
sys.argv = ["sfumato", "show", "tiny.safetensors"]
from sfumato.cli.main import main
try:
    main()
finally:
    print({"torch", "numpy", "safetensors", "huggingface_hub"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    assert "Stable Diffusion 1.x" in done.stdout
    assert done.stdout.rstrip().endswith("set()")
