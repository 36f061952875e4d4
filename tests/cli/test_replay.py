"""`sfumato replay`: the same picture again, elsewhere, or a sentence why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.images import open_image
from sfumato.metadata.carriers import read_recipe


def rewrite(source: Path, target: Path, **changes: object) -> Path:
    """The same picture with another recipe; a change to None takes that part out."""
    with Image.open(source) as image:
        image.load()
        told = json.loads(image.text["sfumato"]) | changes
        info = PngInfo()
        info.add_itxt("sfumato", json.dumps({key: value for key, value in told.items() if value is not None}))
        image.save(target, pnginfo=info)
    return target


def test_same_device_and_dtype_give_the_same_picture(sfumato, drawn, tmp_path):
    picture = Path(shutil.copy(drawn.path, tmp_path / "fox.png"))
    outcome = sfumato("replay", picture, cwd=tmp_path).succeeded()
    assert outcome.out == f"{tmp_path / 'fox-replay.png'}\nidentical to the original\n"
    assert outcome.err == ""
    with Image.open(picture) as first, Image.open(tmp_path / "fox-replay.png") as again:
        assert first.tobytes() == again.tobytes()
        told, retold = json.loads(first.text["sfumato"]), json.loads(again.text["sfumato"])
    assert told == retold


def test_other_ways_to_the_same_picture(sfumato_each, drawn, model, tmp_path):
    shutil.copy(drawn.path, tmp_path / "fox.png")
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    other = "float32" if read_recipe(drawn.path)["dtype"] == "bfloat16" else "bfloat16"
    drawing = ["generate", "the cat", "--model", model, "--steps", "2", "--seed", "3"]
    commands = [
        [*drawing, "--count", "3", "--grid", "-o", "grid.png", "--scheduler", "euler_a"],
        ["replay", "grid.png", "--json"],
        [
            *drawing,
            "--image",
            "start.png",
            "-o",
            "from.png",
            "--negative-prompt",
            "red",
            "--seed",
            str(2**63 - 1),
            "--count",
            "2",
        ],
        ["replay", "from-2.png", "-o", "again.png"],
        ["replay", "fox.png", "--dtype", other],
        ["replay", "fox.png", "--dtype", other, "--json", "--overwrite"],
        ["replay", "fox.png", "-o", "again.png"],
    ]
    outcomes = sfumato_each(commands, cwd=tmp_path)
    for outcome in outcomes:
        outcome.succeeded()
    assert outcomes[1].json == {"image": "grid-replay.png", "psnr_db": None, "identical": True}
    assert outcomes[3].out == "again.png\nidentical to the original\n"
    assert outcomes[4].out.startswith("fox-replay.png\nPSNR against the original: ")
    told = outcomes[5].json
    assert told["image"] == "fox-replay.png"
    assert told["identical"] is False
    assert 15 < told["psnr_db"] < 70  # bfloat16 has 8 bits: near, and not the same
    assert f"{told['psnr_db']:.1f} dB" in outcomes[4].out
    assert outcomes[6].out.startswith("again-2.png\n")
    with Image.open(tmp_path / "fox-replay.png") as image:
        retold = json.loads(image.text["sfumato"])
    assert retold["dtype"] == other
    assert retold["request"]["seed"] == 0


def test_a_promise_that_cannot_be_kept_and_the_exact_image_of_one_that_was(sfumato_each, drawn, model, tmp_path):
    told = read_recipe(drawn.path)["request"]
    fast = {"promise": 10, "deep": {"every": 2}}
    rewrite(drawn.path, tmp_path / "fast.png", request=told | {"fast": fast})
    shutil.copy(drawn.path, tmp_path / "fox.png")
    rewrite(drawn.path, tmp_path / "broken.png", request=told | {"fast": {"promise": 1000}})
    words = ["generate", "A red heart, 3D!", "--model", model, "--steps", "2", "--seed", "0", "--fast", "60 dB"]
    outcomes = sfumato_each(
        [
            [*words, "-o", "asked.png"],
            ["replay", "fast.png"],
            ["replay", "fast.png", "--exact", "-o", "exact.png", "--json"],
            ["replay", "fox.png", "--exact"],
            ["replay", "broken.png"],
        ],
        cwd=tmp_path,
    )
    outcomes[0].succeeded()
    assert outcomes[0].err.count("drawn exactly: 60 dB cannot be promised") == 1
    with Image.open(tmp_path / "asked.png") as asked, Image.open(drawn.path) as image:
        assert asked.tobytes() == image.tobytes()
    assert "fast" not in read_recipe(tmp_path / "asked.png")["request"]
    assert outcomes[1].succeeded().out.startswith("fast-replay.png\nPSNR against the original: ")
    assert read_recipe(tmp_path / "fast-replay.png")["request"]["fast"] == fast
    assert outcomes[2].succeeded().json == {"image": "exact.png", "psnr_db": None, "identical": True}
    assert "fast" not in read_recipe(tmp_path / "exact.png")["request"]
    outcomes[3].failed(2, "fox.png was not drawn with --fast")
    outcomes[4].failed(2, "promise must be")


def test_weights_in_eight_bits_are_repeated_and_compared(sfumato_each, drawn, model, tmp_path):
    words = ["generate", "A red heart, 3D!", "--model", model, "--steps", "2", "--seed", "0"]
    outcomes = sfumato_each(
        [
            [*words, "--eight-bit", "-o", "light.png"],
            ["replay", "light.png", "--json"],
            ["replay", "light.png", "--exact", "-o", "exact.png", "--json"],
            ["replay", "exact.png", "--exact"],
        ],
        cwd=tmp_path,
    )
    outcomes[0].succeeded()
    assert outcomes[0].err.count("U-Net weights in 8 bits, about") == 1
    assert read_recipe(tmp_path / "light.png")["model"]["eight_bit"] is True
    assert outcomes[1].succeeded().json == {"image": "light-replay.png", "psnr_db": None, "identical": True}
    assert 25 < outcomes[2].succeeded().json["psnr_db"] < 90
    assert not read_recipe(tmp_path / "exact.png")["model"].get("eight_bit")
    with Image.open(tmp_path / "exact.png") as exact, Image.open(drawn.path) as image:
        assert exact.tobytes() == image.tobytes()
    outcomes[3].failed(2, "exact.png was not drawn with --fast or weights in 8 bits")


# Changes to a recipe, and what its refusal says. The model is there: nothing of this may wait for it to be loaded.
NONSENSE = {
    "steps": {"request": {"steps": 10**9}},
    "count": {"request": {"count": 10**9}},
    "width": {"request": {"width": "wide"}},
    "image": {"request": {"image": 5}},
    "betas": {"scheduler": {"config": {"beta_start": "x"}}},
    "train": {"scheduler": {"config": {"num_train_timesteps": 10**12}}},
    "name": {"model": {"name": 5}},
    "kind": {"scheduler": {"class": ["DDIMScheduler"]}},
    "dtyped": {"dtype": 5},
}
NONSENSE_SAYS = {
    "steps": "steps must be at most 10000",
    "count": "count must be at most 10000",
    "width": "width must be a positive number of pixels",
    "image": "image must be text",
    "betas": "beta_start must be a number",
    "train": "num_train_timesteps must be at most",
    "name": "name must be text",
    "kind": "class must be text",
    "dtyped": "dtype must be text",
}


def test_what_cannot_be_replayed(sfumato_each, drawn, checkpoints, model, tmp_path):
    shutil.copy(drawn.path, tmp_path / "fox.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    (tmp_path / "torn.png").write_bytes(drawn.path.read_bytes()[:300])
    with Image.open(drawn.path) as image:
        info = PngInfo()
        info.add_itxt("sfumato", image.text["sfumato"])
        image.resize((8, 8)).save(tmp_path / "smaller.png", pnginfo=info)
        seed = json.loads(image.text["sfumato"])["request"]
    rewrite(drawn.path, tmp_path / "moved.png", model={"name": str(tmp_path / "gone"), "weights": "0" * 32})
    rewrite(drawn.path, tmp_path / "hub.png", model={"name": "nobody/nothing", "weights": "0" * 32})
    rewrite(drawn.path, tmp_path / "nomodel.png", model=None)
    rewrite(drawn.path, tmp_path / "nodtype.png", dtype=None)
    rewrite(drawn.path, tmp_path / "field.png", request=seed | {"stepz": 3})
    rewrite(drawn.path, tmp_path / "class.png", scheduler={"class": "Evil", "config": {}})
    told = read_recipe(drawn.path)
    for name, changes in NONSENSE.items():
        kept = {key: told[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
        rewrite(drawn.path, tmp_path / f"{name}.png", **kept)
    rewrite(drawn.path, tmp_path / "start.png", request=seed | {"image": "no.png"}, image={"sha256": "0"})
    before = {path.name for path in tmp_path.iterdir()}
    cases = [
        (
            ["fox.png", "--model", checkpoints("sd21")],
            2,
            "are not those that fox.png was generated with",
            "--model",
        ),
        (["moved.png"], 1, "moved.png was generated with", "give its new path with --model"),
        (["fox.png", "--model", tmp_path / "gone"], 1, "there is no folder"),
        (["plain.png"], 2, "plain.png contains no recipe"),
        (["torn.png"], 2, "torn.png cannot be read as an image"),
        (["none.png"], 2, "there is no image none.png; check the path"),
        (["smaller.png"], 2, "cannot be compared"),
        (["nomodel.png"], 2, "the recipe of nomodel.png is incomplete"),
        (["nodtype.png"], 2, "the recipe of nodtype.png is incomplete"),
        (["field.png"], 2, "a request has no field 'stepz'", "did you mean 'steps'?"),
        (["class.png"], 2, "the recipe names a scheduler 'Evil' that does not exist"),
        (["start.png"], 2, "no.png is missing or has changed; restore it"),
        *(([f"{name}.png"], 2, f"the recipe of {name}.png", NONSENSE_SAYS[name]) for name in NONSENSE),
        (["hub.png"], 1, "generated with nobody/nothing", "--model, or run 'sfumato download nobody/nothing'"),
        (["fox.png", "--output", "x.gif"], 2, "must end in .png"),
        (["fox.png", "--output", "fox.png/x.png"], 1, "is not a folder"),
    ]
    outcomes = sfumato_each([["replay", *words] for words, *_ in cases], cwd=tmp_path)
    for outcome, (_, code, *sentence) in zip(outcomes, cases, strict=True):
        outcome.failed(code, *sentence)
    assert {path.name for path in tmp_path.iterdir()} == before


FOREIGN = Path(__file__).parents[1] / "data" / "metadata"
TEXT = (
    "a (red:1.2) heart\nNegative prompt: blue\nSteps: 3, Sampler: Euler a, Schedule type: Karras, CFG scale: 5, Seed: 7, "
    "Size: 16x16, Model: tiny, Variation seed: 2, Variation seed strength: 0.1, ENSD: 31337, ControlNet 0: "
    '"Module: canny", Version: v1.10.1'
)


def test_a_picture_of_another_program(sfumato_each, model, tmp_path):
    info = PngInfo()
    info.add_text("parameters", TEXT)
    Image.new("RGB", (16, 16)).save(tmp_path / "other.png", pnginfo=info)
    shutil.copy(FOREIGN / "comfyui_img2img.png", tmp_path / "comfy.png")
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "start.png")
    replay = ["replay", "other.png", "--model", model]
    outcomes = sfumato_each(
        [
            ["replay", "other.png"],
            ["show", "other.png"],
            ["show", "other.png", "--json"],
            [*replay, "--dtype", "float32"],
            [*replay, "--dtype", "float32", "--json", "-o", "again.png", "--quiet"],
            [*replay, "--rng", "torch", "--dtype", "float32", "-o", "torch.png"],
            ["replay", "other-replay.png"],
            ["replay", "other-replay.png", "--rng", "torch"],
            ["show", "comfy.png"],
            ["show", "start.png"],
        ],
        cwd=tmp_path,
    )
    outcomes[0].failed(2, "other.png was generated by AUTOMATIC1111 with 'tiny'; give that checkpoint with --model")
    shown = outcomes[1].succeeded().out
    assert "generated by AUTOMATIC1111, 16 × 16 pixels" in shown
    assert "note: ControlNet 0 is ignored: 'Module: canny'" in shown
    told = outcomes[2].succeeded().json
    assert told["request"]["noise"] == {
        "variation_seed": 2, "variation_strength": 0.1, "step_seed": 31337, "posterior": "mean",
    }  # fmt: skip
    assert (told["request"]["rng"], told["request"]["spacing"]) == ("cuda", "karras")
    assert len(told["not_honoured"]) == 1
    outcomes[3].succeeded()
    assert "note: ControlNet 0" in outcomes[3].err
    assert outcomes[3].out.startswith("other-replay.png\nPSNR against the original: ")
    assert outcomes[4].succeeded().err == ""
    assert len(outcomes[4].json["not_honoured"]) == 1
    names = ("other-replay", "again", "torch")
    first, again, other = (open_image(tmp_path / f"{name}.png").tobytes() for name in names)
    assert first == again != other
    # What was drawn again is ours, with a recipe that says all of it.
    assert outcomes[6].succeeded().out.endswith("identical to the original\n")
    outcomes[7].failed(2, "are for images from other programs")
    assert "it was made from another image" in outcomes[8].succeeded().out
    outcomes[9].failed(2, "contains no recipe")


def test_a_picture_of_another_size_is_drawn_and_not_compared(sfumato_each, model, tmp_path):
    info = PngInfo()
    info.add_text("parameters", TEXT)
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png", pnginfo=info)
    replay = ["replay", "other.png", "--model", model, "--output"]
    outcomes = sfumato_each([[*replay, "a.webp"], [*replay, "b.jpg", "--json"], ["replay", "a.webp"]], cwd=tmp_path)
    assert outcomes[0].succeeded().out == "a.webp\nthe original has a different size, so the two cannot be compared\n"
    assert outcomes[1].succeeded().json["psnr_db"] is None
    assert outcomes[2].succeeded().out == "a-replay.png\nidentical to the original\n"


def test_a_refiner_is_told_found_and_repeated(sfumato_each, checkpoints, tmp_path):
    base, refiner = (str(checkpoints(shape)) for shape in ("sdxl", "refiner"))
    drawing = ["generate", "the cat", "--model", base, "--steps", "4", "--seed", "3"]
    commands = [
        [*drawing, "--refiner", refiner, "-o", "fox.png"],
        ["replay", "fox.png"],
        ["replay", "fox.png", "--refiner", base],
        [*drawing, "--refiner-start", "0.5"],
        [*drawing, "--refiner", refiner, "--refiner-start", "1"],
        [*drawing, "--refiner", str(tmp_path / "none")],
    ]
    drawn, same, other, *wrong = sfumato_each(commands, cwd=tmp_path)
    drawn.succeeded()
    assert "identical to the original" in same.succeeded().out
    assert read_recipe(tmp_path / "fox.png")["request"]["refiner"] == refiner
    other.failed(2, "are not those that", "give the right checkpoint (--refiner)")
    wrong[0].failed(2, "give one with --refiner")
    wrong[1].failed(2, "between the first and the last step")
    wrong[2].failed(1, "there is no folder")
