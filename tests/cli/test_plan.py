"""`sfumato plan`: would it fit, how, and how long would it take."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sfumato as library
from sfumato.checkpoints.builtin import builtin_model
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.runtime.facts import machine, machine_names


def test_tables_and_json(sfumato_each, model, tmp_path):
    commands = [
        ["plan", "a fox", "--model", "sd15", "--facts", name, "--width", 512, "--height", 512]
        for name in machine_names()
    ]
    commands += [
        ["plan", "a fox", "--model", "sd15", "--facts", "m1-8gb", "--json", "--count", 4],
        ["plan", "a fox", "--facts", "laptop-8gb", "--dtype", "fp16", "--model", model],
        ["plan", "a fox", "--model", model, "--json", "--steps", 7, "--device", "cpu"],
        ["plan", "--model", "sd15", "--facts", "h200", "--largest"],
        ["plan", "--model", "sd15", "--facts", "h200", "--largest", "--json", "--width", 2048, "--height", 2048],
    ]
    *tables, mac, tiny, here, batch, large = sfumato_each(commands, cwd=tmp_path)
    for name, table in zip(machine_names(), tables, strict=True):
        text = table.succeeded().out
        for word in (machine(name).name, "512 × 512", "50 steps", "peak memory", " GB free", "time", "device", "dtype"):
            assert word in text, (name, word)
        assert text.count("\n- ") >= 5
        assert table.err == ""
    found = mac.succeeded().json
    assert found["machine"] == "Apple M1, 8 GB"
    assert found["plan"]["device"] == "mps"
    assert found["plan"]["micro_batch"] == 1
    assert found["plan"]["peak_bytes"] < found["plan"]["free_bytes"]
    assert "float16 was asked for and became float32" in tiny.succeeded().out
    assert "16 × 16" in tiny.out
    assert str(model) in tiny.out
    own = here.succeeded().json
    assert (own["plan"]["steps"], own["plan"]["device"]) == (7, "cpu")
    pipe = library.DiffusionPipeline.from_pretrained(model)
    assert own["model"]["unet"]["parameters"] == sum(value.numel() for value in pipe.unet.parameters())
    assert int(batch.succeeded().out) > large.succeeded().json["largest_batch"] >= 1


def test_bad_input(sfumato_each, model, tmp_path):
    bad, empty = tmp_path / "bad.json", tmp_path / "empty.json"
    bad.write_text(json.dumps(machine("m1-8gb").to_dict() | {"memory_free": -3}))
    empty.write_text("")
    laptop = ["plan", "a fox", "--model", "sd15", "--facts", "laptop-8gb"]
    commands = [
        [*laptop, "--width", 2048, "--height", 2048],
        [*laptop, "--width", 500],
        [*laptop, "--count", 0],
        [*laptop, "--dtype", "float61"],
        [*laptop, "--device", "cuda"],
        [*laptop, "--model", tmp_path / "none"],
        [*laptop, "--model", model, "--variant", "fp16"],
        ["plan", "a fox", "--facts", "m1-8g"],
        ["plan", "a fox", "--facts", bad],
        ["plan", "a fox", "--facts", empty],
        ["plan", "a fox", "--facts", tmp_path / "none.json"],
        ["plan", "a fox", "--device", "tpu"],
    ]
    outcomes = sfumato_each(commands, cwd=tmp_path)
    wanted = [
        (1, "2048 × 2048", "needs", "GB", "free", "the largest that would fit", "--width"),
        (2, "width must be divisible by 8", "496 or 504"),
        (2, "count must be"),
        (2, "there is no dtype 'float61'", "did you mean"),
        (2, "'cuda' is not present on laptop, 8 GB, no GPU", "cpu"),
        (1, "there is no folder"),
        (1, "variant 'fp16'"),
        (2, "there is no machine 'm1-8g'", "did you mean 'm1-8gb'"),
        (1, str(bad), "memory_free", "-3"),
        (2, str(empty), "--save-facts"),
        (2, "none.json"),
        (2, "there is no device 'tpu'"),
    ]
    for outcome, (code, *words) in zip(outcomes, wanted, strict=True):
        outcome.failed(code, *words)


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced there")
def test_a_limit_on_memory_is_planned_with(environment, tmp_path):
    """A 1024² picture of Stable Diffusion 1.5 under `ulimit -v` of 3 GB is refused with numbers, not tried and killed."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
from sfumato.cli.main import main
sys.argv = ["sfumato", "plan", "fog", "--model", "sd15", "--width", "1024", "--height", "1024", "--device", "cpu", "--dtype", "float32"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    assert "needs" in done.stderr
    assert "free on" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_model_the_built_in_one_is_planned_with_its_own_settings(sfumato_each, tmp_path):
    suggested, asked = sfumato_each([["plan", "--json"], ["plan", "--json", "--steps", 7]], cwd=tmp_path)
    told = suggested.succeeded().json
    assert told["model"]["name"] == "built-in"
    assert told["plan"]["steps"] == suggested_settings(builtin_model())["steps"]
    assert asked.succeeded().json["plan"]["steps"] == 7


def test_a_simulated_plan_imports_no_torch(environment, tmp_path):
    code = """
import sys
from sfumato.cli.main import main
sys.argv = ["sfumato", "plan", "fog", "--model", "sd15", "--facts", "h200", "--largest"]
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
