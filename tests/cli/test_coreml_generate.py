"""`sfumato coreml generate`: Apple's command lines as they stand in the guides, and what is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sfumato.coreml.parts import small_files
from sfumato.metadata.carriers import read_recipe
from support.converted import write_converted
from support.hub import cache

PROMPT = "a photo of an astronaut riding a horse on mars"
NAME = "a-photo-of-an-astronaut-riding-a-horse-on-mars"
NOTE = " became CPU_ONLY: without Core ML"
# What Apple's own framework computes is for a Mac to test; these are about the command line.
GENERATE = ["coreml", "generate", "--portable"]
STEPS = ["--num-inference-steps", 2]


@pytest.fixture(scope="module")
def models(model, tmp_path_factory) -> Path:
    """Our own conversion of the tiny checkpoint, which says what it is."""
    return write_converted(model, tmp_path_factory.mktemp("converted") / "models")


@pytest.fixture(scope="module")
def published(model, tmp_path_factory) -> Path:
    """`models/…` as the guides download them: nested folders that say nothing of themselves."""
    root = tmp_path_factory.mktemp("published")
    for version in ("v1-4", "v1-5"):
        home = root / "models" / f"coreml-stable-diffusion-{version}_original_packages"
        write_converted(model, home / "original" / "packages", described=False, tokenizer=False)
    home = root / "models" / "coreml-stable-diffusion-v1-4_original_compiled"
    write_converted(model, home / "original" / "compiled", kind="compiled", described=False)
    return root


@pytest.fixture(scope="module")
def hub(model, tmp_path_factory) -> dict[str, str]:
    """A cache of the hub that holds what checkpoints say of themselves, and no weights."""
    root = tmp_path_factory.mktemp("hub")
    names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    for repo in ("CompVis/stable-diffusion-v1-4", "runwayml/stable-diffusion-v1-5"):
        cache(root / "hub", repo, model, small_files(repo)(names, True))
    return {"HF_HOME": str(root)}


def picture(path: Path) -> bytes:
    with Image.open(path) as image:
        assert image.size == (16, 16)
        assert len(image.getcolors(2**20)) > 16
        return image.tobytes()


def test_apples_python_runner(sfumato, published, hub):
    words = [
        "-i",
        "models/coreml-stable-diffusion-v1-4_original_packages",
        "-o",
        "out",
        "--compute-unit",
        "CPU_AND_GPU",
    ]
    outcome = sfumato(*GENERATE, "--prompt", PROMPT, *words, "--seed", 93, *STEPS, cwd=published, env=hub)
    outcome.succeeded()
    assert outcome.paths == [Path("out") / f"{NAME}.png"]
    said = outcome.err.splitlines()
    assert said[0].startswith("note: these models do not name their checkpoint")
    assert "CompVis/stable-diffusion-v1-4" in said[0]
    assert said[1].startswith(f"note: CPU_AND_GPU{NOTE}")
    assert said[2].startswith("seed 93, ")
    assert len(said) == 3
    picture(published / outcome.paths[0])


def test_apples_python_runner_with_a_model_version(sfumato, published, hub):
    words = ["--compute-unit", "ALL", "-o", "output", "--seed", 93, *STEPS]
    words += ["-i", "models/coreml-stable-diffusion-v1-5_original_packages"]
    words += ["--model-version", "runwayml/stable-diffusion-v1-5"]
    outcome = sfumato(*GENERATE, "--prompt", PROMPT, *words, cwd=published, env=hub).succeeded()
    told = read_recipe(published / outcome.paths[0])
    assert told["coreml"]["model_version"] == "runwayml/stable-diffusion-v1-5"
    assert told["scheduler"]["class"] == "PNDMScheduler"
    assert [NOTE in line for line in outcome.err.splitlines()] == [True, False]


def test_apples_swift_runner(sfumato, published, hub):
    words = ["--resource-path", "models/coreml-stable-diffusion-v1-4_original_compiled", "--compute-units", "all"]
    outcome = sfumato(*GENERATE, *words, PROMPT, "--step-count", 2, "--seed", 1, cwd=published, env=hub)
    assert outcome.succeeded().paths == [Path(f"{NAME}.png")]
    assert read_recipe(published / f"{NAME}.png")["coreml"]["kind"] == "compiled"


def test_every_spelling_of_both_runners(sfumato_each, models, tmp_path):
    Image.linear_gradient("L").resize((48, 32)).save(tmp_path / "start.png")
    python = [
        "-i",
        models,
        "-o",
        "a.png",
        "--compute-unit",
        "CPU_ONLY",
        "--scheduler",
        "EulerDiscrete",
        "--guidance-scale",
        3,
    ]
    python += ["--negative-prompt", "red", "--unet-batch-one", "--model-sources", "packages", "-s", 4, *STEPS]
    swift = ["--resource-path", models, "--output-path", "b.png", "--compute-units", "cpuOnly", "--scheduler", "dpmpp"]
    swift += ["--image", "start.png", "--strength", "0.5", "--image-count", 2, "--step-count", 4, "--save-every", 1]
    swift += ["--rng", "NUMPY", "--disable-safety", "--reduce-memory", "--seed", 4]
    ours = ["--input", models, "--output", "c.png", "--compute-unit", "CPU_ONLY", "--scheduler", "euler"]
    ours += ["--steps", 2, "--count", 2, "--grid", "--width", 16, "--height", 16, "--json", "--quiet"]
    cases = [["--prompt", "horse", *python], ["horse", *swift], ["horse", *ours]]
    outcomes = sfumato_each([[*GENERATE, *words] for words in cases], cwd=tmp_path)
    for outcome in outcomes:
        outcome.succeeded()
    first, second = read_recipe(tmp_path / "a.png"), read_recipe(tmp_path / "b.png")
    wanted = {
        "prompt": "horse", "negative_prompt": "red", "guidance_scale": 3.0, "scheduler": "EulerDiscrete",
        "steps": 2, "seed": 4, "width": 16, "height": 16,
    }  # fmt: skip
    assert first["request"] == wanted
    wanted = {
        "prompt": "horse",
        "image": "start.png",
        "strength": 0.5,
        "scheduler": "dpmpp",
        "steps": 4,
        "guidance_scale": 7.5,
        "seed": 4,
        "rng": "numpy",
    }
    assert second["request"] == wanted
    assert [path.name for path in outcomes[1].paths] == ["b.png", "b-2.png"]
    assert "it was cropped" in outcomes[1].err
    assert picture(tmp_path / "b.png") != picture(tmp_path / "b-2.png")
    told = outcomes[2].json
    assert told["request"]["count"] == 2
    assert told["recipe"]["coreml"]["compute_unit"] == "CPU_ONLY"
    assert told["plan"] is None
    assert outcomes[2].err == ""
    with Image.open(tmp_path / "c.png") as grid:
        assert grid.size == (32, 16)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"start.png", "a.png", "b.png", "b-2.png", "c.png"}  # and no preview


def test_the_picture_is_the_checkpoints_own(sfumato_each, models, model, tmp_path):
    shared = ["--seed", "3", "--steps", "3", "--rng", "numpy", "--quiet"]
    commands = [
        [*GENERATE, "the cat", "-i", models, "-o", "converted.png", "--compute-unit", "CPU_ONLY", *shared],
        ["generate", "the cat", "--model", model, "-o", "torch.png", "--dtype", "float32", "--device", "cpu", *shared],
    ]
    for outcome in sfumato_each(commands, cwd=tmp_path):
        outcome.succeeded()
    pairs = zip(picture(tmp_path / "converted.png"), picture(tmp_path / "torch.png"), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


def test_replay(sfumato_each, models, tmp_path):
    folder = Path(shutil.copytree(models, tmp_path / "models"))
    drawing = [*GENERATE, "horse", "-i", folder, *STEPS, "--seed", "5", "--scheduler", "euler_a", "-o"]
    commands = [
        [*drawing, "fox.png", "--rng", "numpy", "--compute-unit", "CPU_ONLY"],
        ["replay", "fox.png"],
        ["replay", "fox.png", "--dtype", "bfloat16"],
    ]
    drawn, again, refused = sfumato_each(commands, cwd=tmp_path)
    drawn.succeeded()
    assert again.succeeded().out == "fox-replay.png\nidentical to the original\n"
    assert read_recipe(tmp_path / "fox-replay.png") == read_recipe(tmp_path / "fox.png")
    refused.failed(2, "fox.png was generated with Core ML models, which do not support --device and --dtype")
    folder.rename(tmp_path / "elsewhere")
    gone, named = sfumato_each([["replay", "fox.png"], ["replay", "fox.png", "--model", "elsewhere"]], cwd=tmp_path)
    gone.failed(1, "which was not found; give its new path with --model")
    assert "identical" in named.succeeded().out


def test_misuse_is_one_sentence(sfumato_each, models, model, tmp_path):
    (tmp_path / "empty").mkdir()
    no_unet = Path(shutil.copytree(models, tmp_path / "no-unet"))
    shutil.rmtree(next(no_unet.glob("*_unet.mlpackage")))
    no_encoder = Path(shutil.copytree(models, tmp_path / "no-encoder"))
    shutil.rmtree(next(no_encoder.glob("*_vae_encoder.mlpackage")))
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    before = {path.name for path in tmp_path.iterdir()}
    drawing = ["x", "-i", models, "--compute-unit", "CPU_ONLY"]
    cases = [
        (["-i", models], 2, "the prompt is missing; give one"),
        (["x", "--prompt", "y", "-i", models], 2, "the prompt is given twice"),
        (["x", "-i", "empty"], 1, "there are no Core ML models"),
        (["x", "-i", "gone"], 1, "there is no folder gone"),
        (["x", "-i", model], 1, "is a checkpoint, not a Core ML model; convert it first"),
        (["x", "-i", "no-unet"], 1, "no-unet has no U-Net"),
        (["x", "-i", "no-encoder", "--image", "start.png"], 2, "image-to-image needs a VAE encoder"),
        (["x", "-i", models, "--compute-unit", "CPU_AND_NE"], 2, "CPU_ONLY, the portable runtime runs"),
        (["x", "-i", models, "--compute-units", "gpu"], 2, "there is no compute unit 'gpu'"),
        (["x", "-i", models, "--model-sources", "compiled"], 1, "there are no compiled"),
        (["x", "-i", models, "--model-sources", "zip"], 2, "'packages' or 'compiled', not 'zip'"),
        ([*drawing, "--width", "24"], 2, "only generate images of 16 × 16"),
        ([*drawing, "--rng", "dice"], 2, "rng must be torch, numpy or cuda"),
        ([*drawing, "--rng", "mersenne"], 2, "rng must be torch, numpy or cuda"),
        ([*drawing, "--rng", "numpy", "--seed", str(2**32)], 2, "with rng numpy"),
        ([*drawing, "--scheduler", "EulerDiscretes"], 2, "there is no scheduler 'EulerDiscretes'"),
        ([*drawing, "--image", "none.png"], 2, "there is no image none.png"),
        ([*drawing, "-o", "x.gif"], 2, "must end in .png"),
        ([*drawing, "--save-every", "-1"], 2, "--preview-every must be at least 0"),
        ([*drawing, "--xl"], 2, "Stable Diffusion XL is not supported"),
        ([*drawing, "--sd3"], 2, "Stable Diffusion 3 is not supported"),
        ([*drawing, "--controlnet", "canny"], 2, "ControlNet is not supported yet"),
        ([*drawing, "--controlnet-inputs", "a.png"], 2, "ControlNet is not supported yet"),
        ([*drawing, "--use-multilingual-text-encoder"], 2, "drop the option"),
        ([*drawing, "--script", "latin"], 2, "drop the option"),
    ]
    outcomes = sfumato_each([[*GENERATE, *words] for words, *_ in cases], cwd=tmp_path)
    for outcome, (_, code, *sentence) in zip(outcomes, cases, strict=True):
        said = [line for line in outcome.err.splitlines() if NOTE not in line]
        type(outcome)(outcome.code, outcome.out, "\n".join(said)).failed(code, *sentence)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_recipe_that_is_not_whole(sfumato_each, models, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    drawing = [*GENERATE, "horse", "-i", models, *STEPS, "-o", "fox.png", "--compute-unit", "CPU_ONLY"]
    sfumato_each([drawing], cwd=tmp_path)[0].succeeded()
    told = read_recipe(tmp_path / "fox.png")
    for name, value in (("word", "x"), ("part", {"kind": "packages"})):
        info = PngInfo()
        info.add_itxt("sfumato", json.dumps(told | {"coreml": value}))
        with Image.open(tmp_path / "fox.png") as image:
            image.save(tmp_path / f"{name}.png", pnginfo=info)
    for outcome in sfumato_each([["replay", "word.png"], ["replay", "part.png"]], cwd=tmp_path):
        outcome.failed(2, "is incomplete")
