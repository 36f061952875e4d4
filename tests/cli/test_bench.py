"""`sfumato bench`: the guide's table, on a checkpoint small enough to take seconds."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from sfumato.runtime.facts import read_facts


@pytest.mark.parametrize("peers", ["", pytest.param("diffusers", marks=pytest.mark.long)])
def test_table_json_and_plot(sfumato, model, tmp_path, peers):
    words = ["bench", "--model", model, "--steps", 6, "--runs", 1, "--quick", "--peers", peers]
    words += ["--json", "new/bench.json", "--plot", "bench.svg"]
    done = sfumato(*words, cwd=tmp_path).succeeded()
    told = json.loads((tmp_path / "new" / "bench.json").read_text(encoding="utf-8"))
    assert (told["model"], told["size"], told["steps"]) == (str(model), 16, 6)
    rows = told["pictures"] + told["unet"] + told["vae"]
    half = read_facts("cpu").native_bfloat16("cpu")
    assert len(rows) == (4 if half else 3) + (2 + 3 + 3 if peers else 0)
    for row in rows:
        assert row["name"] in done.out
        assert row["seconds"] > 0
        assert 2**26 < row["peak_bytes"] < 2**30
    first = told["pictures"][0]
    assert (first["ratio"], first["counted"], first["steps"]) == (1, 4, 7)
    for note in told["notes"]:
        assert f"- {note}" in done.out
    assert any("--quick" in note for note in told["notes"])
    assert ("one U-Net call" in done.out) == bool(peers)
    drawn = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert f"{model}, 16 × 16" in "".join(ElementTree.fromstring(drawn).itertext())


def test_bad_input(sfumato_each, model, tmp_path):
    (tmp_path / "file").write_text("")
    bench = ["bench", "--model", model]
    commands = [
        [*bench, "--plot", "bench.png"],
        [*bench, "--peers", "diffuser"],
        [*bench, "--runs", 0],
        [*bench, "--steps", -1],
        [*bench, "--size", 15],
        [*bench, "--size", -16],
        [*bench, "--json", "file/bench.json"],
        ["bench", "--model", tmp_path / "none"],
        [*bench, "--peers", "diffusers"],
    ]
    absent = "import sfumato.bench.report as report\nreport.find_spec = lambda name: None\n"
    *outcomes, missing = sfumato_each(commands, cwd=tmp_path, before=absent)
    wanted = [
        (2, "must end in .svg", ".png"),
        (2, "there is no peer 'diffuser'", "did you mean 'diffusers'"),
        (2, "runs must be at least 1"),
        (2, "steps must be at least 1"),
        (2, "width must be divisible by", "16"),
        (2, "width must be a positive number"),
        (1, "cannot be written"),
        (1, "there is no folder"),
    ]
    for outcome, (code, *words) in zip(outcomes, wanted, strict=True):
        outcome.failed(code, *words)
    missing.failed(1, "diffusers is not installed", "pip install diffusers transformers accelerate")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
