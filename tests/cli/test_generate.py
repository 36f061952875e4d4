"""`sfumato generate`: the picture, its name, its recipe, and what is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli.conftest import SCRIPT
from sfumato.runtime.facts import read_facts


def recipe(path: Path) -> dict:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return json.loads(image.text["sfumato"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_picture_is_written_printed_and_carries_its_recipe(drawn, model):
    outcome = drawn.outcome.succeeded()
    assert outcome.out == "a-red-heart-3d.png\n"
    assert re.fullmatch(r"seed 0, \d+\.\d s\n", outcome.err)
    assert names(drawn.path.parent) == {"a-red-heart-3d.png"}
    with Image.open(drawn.path) as image:
        assert image.size == (16, 16)
        assert image.mode == "RGB"
        assert len(image.getcolors(2**20)) > 16
    told = recipe(drawn.path)
    assert told["request"] == {
        "prompt": "A red heart, 3D!", "steps": 2, "guidance_scale": 7.5, "seed": 0, "width": 16, "height": 16,
        "prompt_syntax": "a1111",
    }  # fmt: skip
    assert told["model"]["name"] == str(model)
    assert re.fullmatch(r"[0-9a-f]{32}", told["model"]["weights"])
    assert told["scheduler"]["class"] == "PNDMScheduler"
    assert told["scheduler"]["config"]["beta_schedule"] == "scaled_linear"
    native = read_facts("cpu").native_bfloat16("cpu")
    assert (told["dtype"], told["device"]) == ("bfloat16" if native else "float32", "cpu")
    assert {"sfumato", "torch", "python"} <= told["versions"].keys()


def test_second_passes_seamless_images_and_the_rest_are_repeated(sfumato_each, model, tmp_path):
    draw = ["generate", "a horse", "--model", model, "--steps", "2", "--seed", "7", "--output"]
    extras = ["--hires", "1.5", "--hires-upscaler", "lanczos", "--hires-strength", "0.5", "--hires-steps", "3", "--hires-scheduler", "heun",
              "--seamless", "x", "--freeu", "1.5,1.6,0.9,0.2", "--guidance-interval", "0.1,1"]  # fmt: skip
    text = (
        "a horse\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 7, Size: 16x16, Denoising strength: 0.7, Tiling: True, "
        "Hires upscale: 2, Hires upscaler: Latent, Version: v1.10.1"
    )
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (32, 32)).save(tmp_path / "theirs.png", pnginfo=info)
    made, again, theirs, alone, wrong, few, unknown = sfumato_each(
        [
            [*draw, "made.png", *extras],
            ["replay", "made.png"],
            ["replay", "theirs.png", "--model", model, "--json"],
            [*draw, "x.png", "--hires-steps", "3"],
            [*draw, "x.png", "--hires", "large"],
            [*draw, "x.png", "--freeu", "1,2"],
            [*draw, "x.png", "--hires", "2", "--hires-scheduler", "hein"],
        ],
        cwd=tmp_path,
    )
    made.succeeded()
    told = recipe(tmp_path / "made.png")["request"]
    assert told["hires"] == {"scale": 1.5, "upscaler": "lanczos", "strength": 0.5, "steps": 3, "scheduler": "heun"}
    assert (told["seamless"], told["guidance_interval"]) == ("x", {"start": 0.1})
    assert told["freeu"] == {"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (24, 24)
        assert "Hires upscaler: Lanczos" in image.text["parameters"]
    assert "identical to the original" in again.succeeded().out
    assert theirs.succeeded().json["not_honoured"] == []
    assert recipe(tmp_path / "theirs-replay.png")["request"]["hires"] == {}
    alone.failed(2, "--hires-steps needs a second pass; give its size with --hires 2")
    wrong.failed(2, "--hires must be a number such as 2 or 1024x1536, not 'large'")
    unknown.failed(2, "'hein'")
    few.failed(2, "--freeu must be 4 numbers such as 1.5,1.6,0.9,0.2, not '1,2'")


def test_json_says_as_requested_only_of_what_was_requested(sfumato, model, tmp_path):
    told = sfumato("generate", "horse", "--model", model, "--steps", 1, "--json", cwd=tmp_path).succeeded().json
    assert told["plan"]["reasons"]
    assert [reason for reason in told["plan"]["reasons"] if "as requested" in reason] == []


def test_every_option_reaches_the_picture(sfumato, model, tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii"}  # as on terminals that cannot print every character
    words = [
        "--scheduler",
        "DPMPP-2M-karras",
        "--width",
        24,
        "--height",
        32,
        "--negative-prompt",
        "blue",
        "--guidance-scale",
        3,
    ]
    words += [
        "--guidance-rescale",
        0.5,
        "--clip-skip",
        1,
        "--count",
        3,
        "--grid",
        "--seed",
        7,
        "--steps",
        3,
        "--dtype",
        "bf16",
    ]
    words += ["--prompt-syntax", "comfyui", "--negative-clip-skip", 0, "--spacing", "exponential", "--rng", "cuda"]
    words += ["--device", "cpu", "-o", "new/folder/x.png", "--json", "--quiet"]
    outcome = sfumato("generate", "horse 🐴", "--model", model, *words, cwd=tmp_path, env=ascii_only).succeeded()
    assert outcome.err == ""
    told = outcome.json
    asked = [reason for reason in told["plan"]["reasons"] if "as requested" in reason]
    assert [reason.partition(" ")[0] for reason in asked] == ["device", "U-Net"]
    assert told["images"] == [str(Path("new/folder/x.png"))]
    assert told["seeds"] == [7, 8, 9]
    assert {"encode", "denoise", "decode"} <= told["seconds"].keys()
    wanted = {
        "prompt": "horse 🐴", "negative_prompt": "blue", "guidance_scale": 3.0, "guidance_rescale": 0.5, "clip_skip": 1,
        "scheduler": "DPMPP-2M-karras", "width": 24, "height": 32, "count": 3, "seed": 7, "steps": 3,
        "prompt_syntax": "comfyui", "negative_clip_skip": 0, "spacing": "exponential", "rng": "cuda",
    }  # fmt: skip
    assert told["request"] == wanted
    carried = recipe(tmp_path / "new/folder/x.png")
    assert carried["request"] == wanted
    assert carried["grid"] is True
    assert carried["dtype"] == told["recipe"]["dtype"] == "bfloat16"
    assert carried["scheduler"]["class"] == "DPMSolverMultistepScheduler"
    assert carried["scheduler"]["config"]["use_karras_sigmas"] is True
    with Image.open(tmp_path / "new/folder/x.png") as grid:
        assert grid.size == (48, 64)  # 2 × 2 places for three pictures
        assert grid.crop((24, 32, 48, 64)).getcolors() == [(24 * 32, (0, 0, 0))]
        assert len(grid.crop((0, 32, 24, 64)).getcolors(2**20)) > 16


def test_existing_files_are_kept_and_each_picture_of_several_has_its_own_seed(sfumato, model, drawn, tmp_path):
    (tmp_path / "heart.png").write_bytes(b"mine")
    words = ["--count", 2, "--seed", 0, "--steps", 2, "--output", "heart.png"]
    outcome = sfumato("generate", "A red heart, 3D!", "--model", model, *words, cwd=tmp_path).succeeded()
    assert outcome.paths == [Path("heart-2.png"), Path("heart-3.png")]
    assert names(tmp_path) == {"heart.png", "heart-2.png", "heart-3.png"}
    assert (tmp_path / "heart.png").read_bytes() == b"mine"
    assert [recipe(tmp_path / path)["request"]["seed"] for path in outcome.paths] == [0, 1]
    with Image.open(tmp_path / "heart-2.png") as of_two, Image.open(drawn.path) as alone:
        assert of_two.tobytes() == alone.tobytes()
    with Image.open(tmp_path / "heart-2.png") as first, Image.open(tmp_path / "heart-3.png") as second:
        assert first.tobytes() != second.tobytes()


def test_from_a_picture_over_an_existing_one(sfumato, model, tmp_path):
    Image.linear_gradient("L").resize((21, 33)).save(tmp_path / "start.jpg")
    (tmp_path / "out.png").write_bytes(b"to be replaced")
    (tmp_path / "out.preview.png").write_bytes(b"mine, whatever its name")
    words = ["--image", "start.jpg", "--strength", 0.5, "--steps", 4, "--scheduler", "ddim", "--preview-every", 1]
    words += ["--output", "out.png", "--overwrite"]
    outcome = sfumato("generate", "horse", "--model", model, *words, cwd=tmp_path).succeeded()
    assert outcome.paths == [Path("out.png")]
    assert names(tmp_path) == {"start.jpg", "out.png", "out.preview.png"}
    assert (tmp_path / "out.preview.png").read_bytes() == b"mine, whatever its name"
    told = recipe(tmp_path / "out.png")
    assert told["request"]["image"] == "start.jpg"
    assert told["request"]["strength"] == 0.5
    assert re.fullmatch(r"[0-9a-f]{64}", told["image"]["sha256"])
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (20, 32)  # the start, down to multiples of the VAE's factor


def test_without_a_seed_one_is_picked_and_said_and_words_that_do_not_fit_are_too(sfumato, model, tmp_path):
    (tmp_path / "pictures").mkdir()
    prompt = " ".join(["photo of the astronaut"] * 10) + " unseen"
    words = ["--prompt-syntax", "plain", "--steps", 1, "-o", "pictures"]
    outcome = sfumato("generate", prompt, "--model", model, *words, cwd=tmp_path).succeeded()
    (path,) = outcome.paths
    assert path.parent == Path("pictures")
    assert path.name.startswith("photo-of-the-astronaut-photo")
    assert len(path.name) <= 64
    note, seed = outcome.err.splitlines()
    assert note.startswith("note: the prompt is longer than the model's 20 tokens; ignored: '")
    assert note.endswith("unseen'")
    told = recipe(tmp_path / path)
    assert seed.startswith(f"seed {told['request']['seed']}, ")
    assert told["notes"] == [note.removeprefix("note: ")]


def test_the_built_in_model_is_drawn_with_and_replayed_under_its_own_name(sfumato_each, model, tmp_path):
    before = f"import pathlib, sfumato.checkpoints.builtin as b; b.FOLDER = pathlib.Path({str(model)!r})"
    commands = [["generate", "horse", "--steps", "1", "-o", "x.png"], ["replay", "x.png"], ["show", "--json"]]
    made, again, shown = sfumato_each(commands, cwd=tmp_path, before=before)
    made.succeeded()
    assert recipe(tmp_path / "x.png")["model"]["name"] == "built-in"
    assert "identical to the original" in again.succeeded().out
    assert shown.succeeded().json["parts"]["unet"]["class"] == "UNet2DConditionModel"


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals and no SIGINT to a process of its own")
def test_progress_is_shown_and_ctrl_c_leaves_nothing_behind(environment, model, tmp_path):
    ours, theirs = pytest.importorskip("pty").openpty()
    command = [
        SCRIPT,
        "generate",
        "horse",
        "--model",
        model,
        "--steps",
        "500",
        "--scheduler",
        "ddim",
        "--preview-every",
        "1",
        "--width",
        "64",
        "--height",
        "64",
        "-o",
        "x.png",
    ]
    environment = environment | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=theirs,
        # A test run started in the background of a script ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = b""
    try:
        deadline = time.monotonic() + 300
        while not LEFT.search(plain(seen)) or not (tmp_path / "x.preview.png").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, seen
            seen += os.read(ours, 65536)
        with Image.open(tmp_path / "x.preview.png") as preview:
            assert preview.size == (64, 64)
        process.send_signal(signal.SIGINT)
        seen += rest(ours)
        out = process.stdout.read()
        assert process.wait() == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(ours)
    text = plain(seen)
    assert text.rstrip().endswith("sfumato: interrupted; no unfinished files were left behind")
    assert text.count("sfumato:") == 1
    assert "Traceback" not in text
    assert out == b""
    assert names(tmp_path) == set()


# The step, the steps in all, the time gone and the time left.
LEFT = re.compile(r"generating .* [1-9]\d*/500 \d:\d\d:\d\d left \d:\d\d:\d\d")


def plain(seen: bytes) -> str:
    """What a terminal shows, without the codes that move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode(errors="replace"))


def rest(terminal: int) -> bytes:
    """All that is still written to a terminal until its other end is closed."""
    read = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            return read
        if not part:
            return read
        read += part


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_no_space_left(environment, model, tmp_path):
    line = 'ulimit -f 0 && exec "$0" "$@"'  # as on a full disk, every file can be made and none can be filled
    command = ["sh", "-c", line, SCRIPT, "generate", "horse", "--model", model, "--steps", "1", "-o", "x.png", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "sfumato: x.png cannot be written (File too large); choose another path\n"
    assert names(tmp_path) == set()
