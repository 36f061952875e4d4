"""`sfumato replay`: the same picture again, elsewhere, or a sentence why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.images import read_recipe


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
    rewrite(drawn.path, tmp_path / "nomodel.png", model=None)
    rewrite(drawn.path, tmp_path / "nodtype.png", dtype=None)
    rewrite(drawn.path, tmp_path / "field.png", request=seed | {"stepz": 3})
    rewrite(drawn.path, tmp_path / "class.png", scheduler={"class": "Evil", "config": {}})
    rewrite(drawn.path, tmp_path / "start.png", request=seed | {"image": "no.png"}, image={"sha256": "0"})
    before = {path.name for path in tmp_path.iterdir()}
    cases = [
        (["fox.png", "--model", checkpoints("sd21")], 2, "are not those fox.png was drawn with", "--model"),
        (["moved.png"], 1, "moved.png was drawn with", "say where it is now with --model"),
        (["fox.png", "--model", tmp_path / "gone"], 1, "there is no folder"),
        (["plain.png"], 2, "plain.png carries no recipe"),
        (["torn.png"], 2, "torn.png cannot be read as a picture"),
        (["none.png"], 2, "there is no picture none.png; check the path"),
        (["smaller.png"], 2, "cannot be compared"),
        (["nomodel.png"], 2, "the recipe of nomodel.png is not whole"),
        (["nodtype.png"], 2, "the recipe of nodtype.png is not whole"),
        (["field.png"], 2, "a request has no field 'stepz'", "did you mean 'steps'?"),
        (["class.png"], 2, "the recipe names a scheduler 'Evil' that does not exist"),
        (["start.png"], 2, "no.png, is gone or changed; put it back"),
        (["fox.png", "--output", "x.gif"], 2, "--output must end in .png"),
        (["fox.png", "--output", "fox.png/x.png"], 1, "is not a folder"),
    ]
    outcomes = sfumato_each([["replay", *words] for words, *_ in cases], cwd=tmp_path)
    for outcome, (_, code, *sentence) in zip(outcomes, cases, strict=True):
        outcome.failed(code, *sentence)
    assert {path.name for path in tmp_path.iterdir()} == before
