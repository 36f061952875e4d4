"""Each kind of bad input: one sentence that names it and the next step, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.conftest import SCRIPT, Outcome

# Misuse that is seen before torch is imported, and words of the sentence it gets.
MISUSE = [
    (["--steps", "0"], "steps must be a whole number of at least 1, not 0"),
    (["--steps", "-3"], "steps must be a whole number of at least 1, not -3"),
    (["--count", "0"], "count must be"),
    (["--seed", "-1"], "seed must be a whole number from 0"),
    (["--seed", str(2**63)], "seed must be a whole number from 0"),
    (["--width", "0"], "width must be a positive number of pixels"),
    (["--height", "-8"], "height must be a positive number of pixels"),
    (["--strength", "1.5"], "strength must be a number from 0 to 1, not 1.5"),
    (["--eta", "2"], "eta must be a number from 0 to 1"),
    (["--guidance-scale", "nan"], "guidance_scale must be a number"),
    (["--guidance-rescale", "-1"], "guidance_rescale must be a number from 0 to 1"),
    (["--clip-skip", "-1"], "clip_skip must be"),
    (["--scheduler", "dpmp_2m"], "did you mean 'dpmpp_2m'"),
    (["--output", "x.gif"], "must end in .png, .jpg or .webp, not x.gif"),
    (["--preview-every", "-1"], "--preview-every must be at least 0"),
    (["--mask", "m.png"], "a mask needs an image to change; give the image too"),
    (["--noise-level", "1000"], "noise_level must be at most 999"),
    (["--depth", "d.png", "--image", "i.png"], "there is no image i.png"),
    (["--mask-edge", "4"], "--mask-edge and --mask-crop need a mask"),
    (
        ["--image", "i.png", "--extend", "up=4"],
        "--extend takes sides and pixels such as left=256,top=64, not 'up=4'",
    ),
    (["--image", "i.png", "--extend", "left=0"], "a mask needs a file, or pixels to extend"),
    (["--image", "i.png", "--extend", "left=99999"], "extend must be"),
]


def test_wrong_values_are_misuse(sfumato_each, tmp_path):
    commands = [["generate", "horse", "--model", "nowhere", *words] for words, _ in MISUSE]
    for outcome, (_, sentence) in zip(sfumato_each(commands, cwd=tmp_path), MISUSE, strict=True):
        outcome.failed(2, sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "x", "--step", "3"], "No such option: --step"),
        (["generate", "x", "--steps", "many"], "Invalid value for '--steps'"),
        (["generate", "x", "--steps"], "requires an argument"),
        (["generate"], "Missing argument"),
        (["draw", "x"], "No such command 'draw'"),
    ],
)
def test_what_the_parser_refuses(sfumato, words, sentence, tmp_path):
    outcome = sfumato(*words, cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.out == ""
    assert sentence.lower() in outcome.err.lower()
    assert "Traceback" not in outcome.err


def test_places_that_cannot_be_written_are_known_before_anything_is_loaded(sfumato, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for output in ("file/x.png", "file/deeper/x.png"):
        outcome = sfumato("generate", "horse", "--model", "nowhere", "--output", output, cwd=tmp_path)
        outcome.failed(1, str(Path(output).parent), "is not a folder", "choose another path")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_folder_without_permission(environment, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    code = "from sfumato.cli.main import main; main()"
    if os.geteuid() == 0:
        # Root may write anywhere: the same command as someone who may not, once all it needs is imported.
        rehearsal = "import contextlib, os, sfumato.files, sfumato.cli.main as cli\nwith contextlib.suppress(SystemExit): cli.app(['schedulers', '--json'])\n"
        code = rehearsal + "os.dup2(2, 1); os.setuid(65534); cli.main()"
    command = [sys.executable, "-c", code, "generate", "horse", "-o", "locked/x.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    locked.chmod(0o755)
    Outcome(done.returncode, "", done.stderr).failed(1, "no permission to write locked", "choose another path")
    assert list(locked.iterdir()) == []


def test_what_is_only_known_with_torch(sfumato_each, model, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "words.txt").write_text("not an image")
    before = {path.name for path in tmp_path.iterdir()}
    cases = [
        (["--image", "torn.png"], 2, "torn.png cannot be read as an image", "give a PNG, JPEG or WebP"),
        (["--image", "words.txt"], 2, "words.txt cannot be read as an image"),
        (["--image", "none.png"], 2, "there is no image none.png; check the path"),
        (["--image", "."], 2, "cannot be read as an image"),
        (["--dtype", "float33"], 2, "there is no dtype 'float33'", "did you mean 'float32'?"),
        (["--device", "gpu"], 2, "there is no device 'gpu'", "use cuda, mps or cpu"),
        (["--width", "15"], 2, "width must be divisible by 2, and 15 is not; try 14 or 16"),
        (["--height", "1"], 2, "height must be divisible by 2", "try 2"),
        (["--steps", "1001", "--scheduler", "ddim"], 2, "steps must be at most 1000", "1000"),
        (["--steps", "1000", "--scheduler", "ddim"], 2, "1000 steps with steps_offset 1", "use fewer steps"),
        (
            ["--width", "2000000", "--height", "2000000", "--steps", "1"],
            1,
            "1 image of 2000000 × 2000000 needs",
            "are free",
            "--width",
        ),
    ]
    commands = [["generate", "horse", "--model", model, *words] for words, *_ in cases]
    for outcome, (_, code, *sentence) in zip(sfumato_each(commands, cwd=tmp_path), cases, strict=True):
        outcome.failed(code, *sentence)
    assert {path.name for path in tmp_path.iterdir()} == before


def damage(model: Path, folder: Path) -> list[tuple[Path | str, list[str]]]:
    """Checkpoints that are each damaged in one way, and words of the sentence each must get."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, folder / name))

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    weights = "unet/diffusion_pytorch_model.safetensors"
    torn = copy("torn")
    with (torn / weights).open("r+b") as stream:
        stream.truncate((torn / weights).stat().st_size // 2)
    empty = copy("empty")
    (empty / weights).write_bytes(b"")
    gone = copy("gone")
    (gone / weights).unlink()
    surplus, missing = copy("surplus"), copy("missing")
    edit(surplus / "text_encoder/config.json", num_hidden_layers=2)
    edit(missing / "text_encoder/config.json", num_hidden_layers=4)
    wider = copy("wider")
    edit(wider / "vae/config.json", block_out_channels=[8, 32])
    unsupported = copy("unsupported")
    edit(unsupported / "unet/config.json", down_block_types=["AttnDownBlock2D"] * 4)
    noindex = copy("noindex")
    (noindex / "model_index.json").unlink()
    notjson = copy("notjson")
    (notjson / "vae/config.json").write_text("{")
    pickled = copy("pickled")
    (pickled / weights).rename(pickled / "unet/diffusion_pytorch_model.bin")
    escaping = copy("escaping")
    (escaping / weights).unlink()
    nan = copy("nan")
    state = load_file(nan / weights)
    state["conv_out.bias"] = torch.full_like(state["conv_out.bias"], torch.nan)
    save_file(state, nan / weights, metadata={"format": "pt"})
    index = {"weight_map": {"conv_in.weight": "../../model/" + weights}}
    (escaping / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return [
        (folder / "nowhere", ["there is no folder", "give an existing folder or a hub id"]),
        ("a/b/c", ["there is no folder a/b/c"]),
        (torn, [str(torn / weights), "truncated", "download or copy it again"]),
        (empty, [str(empty / weights), "truncated", "download or copy it again"]),
        (gone, [str(gone / "unet"), "has no diffusion_pytorch_model.safetensors", "incomplete"]),
        (surplus, [str(surplus / "text_encoder"), "weights that the model does not have", "check config.json"]),
        (
            missing,
            [str(missing / "text_encoder"), "weights missing, the first is 'text_model.encoder.layers.3", "damaged"],
        ),
        (wider, [str(wider / "vae"), "has shape", "the weights do not match config.json"]),
        (unsupported, ["AttnDownBlock2D"]),
        (noindex, [str(noindex / "model_index.json"), "is missing"]),
        (notjson, [str(notjson / "vae" / "config.json"), "cannot be read as JSON", "copy or download it again"]),
        (pickled, [str(pickled / "unet"), "pickled weights", "safetensors"]),
        (nan, ["U-Net, step 1 of", "NaN"]),
        (escaping, ["leads out of the folder", "do not use this checkpoint"]),
    ]


def test_damaged_checkpoints(sfumato_each, model, tmp_path):
    (tmp_path / "work").mkdir()
    cases = damage(model, tmp_path)
    commands = [["generate", "horse", "--steps", "2", "--preview-every", "1", "--model", name] for name, _ in cases]
    for outcome, (_, sentence) in zip(sfumato_each(commands, cwd=tmp_path / "work"), cases, strict=True):
        outcome.failed(1, *sentence)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe whose reader has gone")
def test_reader_that_has_gone(environment, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [SCRIPT, "schedulers"],
        cwd=tmp_path,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not pass bytes that are no text")
def test_prompt_that_is_no_text(environment, tmp_path):
    done = subprocess.run(
        [os.fsencode(SCRIPT), b"generate", b"caf\xe9"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    Outcome(done.returncode, done.stdout, done.stderr).failed(2, "the prompt contains bytes that are not valid UTF-8")
