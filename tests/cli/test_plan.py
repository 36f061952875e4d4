"""`sfumato plan`: would it fit, how, and how long would it take."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import sfumato as library
from sfumato.checkpoints.builtin import builtin_model
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.runtime.facts import machine, machine_names, read_facts


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
    assert "float32 instead of float16" in tiny.succeeded().out
    assert "16 × 16" in tiny.out
    assert str(model) in tiny.out
    own = here.succeeded().json
    assert (own["plan"]["steps"], own["plan"]["device"]) == (7, "cpu")
    pipe = library.DiffusionPipeline.from_pretrained(model)
    assert own["model"]["unet"]["parameters"] == sum(value.numel() for value in pipe.unet.parameters())
    assert int(batch.succeeded().out) > large.succeeded().json["largest_batch"] >= 1


def test_a_second_pass_is_planned(sfumato_each, tmp_path):
    plan = ["plan", "a fox", "--model", "sd15", "--facts", "rtx-4090", "--steps", "20"]
    hires = ["--hires", "2", "--hires-steps", "15"]
    refined = ["plan", "a fox", "--model", "sdxl", "--refiner", "sdxl-refiner", "--facts", "h200", "--hires", "1.5"]
    text, one, two, pixels, both, wrong = sfumato_each(
        [[*plan, *hires], [*plan, "--json"], [*plan, *hires, "--json"],
         [*plan, *hires, "--hires-upscaler", "lanczos", "--json"], [*refined, "--json"],
         [*plan, "--hires-steps", "3"]], cwd=tmp_path,
    )  # fmt: skip
    assert "1 image of 1024 × 1024, 15 steps after 20 of 512 × 512" in text.succeeded().out
    first, large, lanczos = (outcome.succeeded().json["plan"] for outcome in (one, two, pixels))
    assert large["seconds"] > first["seconds"]
    assert large["peak_bytes"] > first["peak_bytes"]
    assert lanczos["seconds"] > large["seconds"]  # its pixels are encoded again
    found = both.succeeded().json
    # Of a second pass of 50 steps at the end of 71, the refiner takes those in the last fifth of the schedule.
    assert (found["plan"]["steps"], found["refiner"]["plan"]["steps"]) == (35, 15)
    wrong.failed(2, "--hires-steps needs a second pass; give its size with --hires 2")


def test_a_refiner_is_planned_after_the_first_checkpoint(sfumato_each, tmp_path):
    plan = ["plan", "a fox", "--model", "sdxl", "--refiner", "sdxl-refiner", "--facts", "rtx-4090"]
    text, data, missing = sfumato_each([plan, [*plan, "--json"], [*plan[:5], "no-such-folder"]], cwd=tmp_path)
    first, second = text.succeeded().out.split("Stable Diffusion XL refiner on")
    assert "40 steps" in first
    assert "1024 × 1024, 10 steps" in second  # of 50, the last fifth
    found = data.succeeded().json
    assert (found["plan"]["steps"], found["refiner"]["plan"]["steps"]) == (40, 10)
    assert (missing.code, "no-such-folder" in missing.err) == (1, True)


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
        (1, "2048 × 2048", "needs", "GB", "free", "the largest that fits", "--width"),
        (2, "width must be divisible by 8", "496 or 504"),
        (2, "count must be"),
        (2, "there is no dtype 'float61'", "did you mean"),
        (2, "'cuda' is not available on laptop, 8 GB, no GPU", "cpu"),
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
def test_a_limit_on_memory_is_planned_with(server, tmp_path):
    """A 1024² picture of Stable Diffusion 1.5 under `ulimit -v` of 3 GB is refused with numbers, not tried and killed."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
from sfumato.cli.main import main
sys.argv = ["sfumato", "plan", "fog", "--model", "sd15", "--width", "1024", "--height", "1024", "--device", "cpu", "--dtype", "float32"]
main()
"""
    done = server.run(code, [], cwd=tmp_path)
    assert done.code == 1, done.out
    assert "needs" in done.err
    assert "free on" in done.err
    assert "Traceback" not in done.err


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


def test_the_side_that_was_not_given_is_said(sfumato_each, tmp_path):
    laptop = ["plan", "fog", "--model", "sd15", "--facts", "laptop-8gb"]
    commands = [[*laptop, "-W", 1024], [*laptop, "-H", 768], laptop, [*laptop, "-W", 512, "-H", 512]]
    wide, high, neither, both = (run.succeeded().out for run in sfumato_each(commands, cwd=tmp_path))
    assert "1024 × 512" in wide
    assert "only the width was given, so the height is the model's own, 512; set it with --height" in wide
    assert "only the height was given, so the width is the model's own, 512; set it with --width" in high
    assert "was given" not in neither + both


@pytest.mark.skipif(os.name == "nt", reason="reads the time of processes from the system")
def test_time_is_within_a_factor_of_two_for_the_small_model(installed, tmp_path):
    """Compared with the processor's time, which other programs on the same cores do not stretch: nor may the plan's."""
    import resource

    installed("generate", "a red apple", cwd=tmp_path).succeeded()  # kernels are compiled, files are in memory
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    installed("generate", "a red apple, 3d", cwd=tmp_path).succeeded()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = dataclasses.replace(read_facts("cpu"), load=0.0, speeds={})
    facts.to_json(tmp_path / "idle.json")
    words = ("plan", "a red apple, 3d", "--facts", "idle.json", "--json")
    told = installed(*words, cwd=tmp_path).succeeded().json["plan"]["seconds"]
    assert took / 2 < told < 2 * took
