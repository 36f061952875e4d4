"""`sfumato doctor`: what the machine is, what it lacks, how fast it is; measured once."""

from __future__ import annotations

import json

import torch

from sfumato.runtime.facts import Facts, machine, machine_names


def test_this_machine_is_measured_once(sfumato_each, tmp_path):
    cache, saved = tmp_path / "cache", tmp_path / "facts.json"
    # The same measurements over less work.
    before = "from sfumato.runtime import speeds; speeds.SCALE, speeds.LEAST_SECONDS = {'cpu': 4, 'cuda': 4, 'mps': 4}, 0.002\n"
    options = {"cwd": tmp_path, "env": {"SFUMATO_CACHE": str(cache)}, "before": before}
    first, second, again = sfumato_each(
        [["doctor", "--json", "--save-facts", saved], ["doctor", "--json"], ["doctor", "--json", "--again"]], **options
    )
    found = first.succeeded().json
    names = {check["name"] for check in found["checks"]}
    assert {"Python", "torch", "processor", "instructions", "cores", "memory", "C compiler"} <= names
    assert all(check["mend"] or check["state"] == "good" for check in found["checks"])
    assert found["facts"]["libraries"]["torch"] == torch.__version__
    assert set(found["dtypes"]) == {"float32", "bfloat16", "float16"}
    assert found["dtypes"]["float32"].startswith("native")
    speeds = found["facts"]["speeds"]
    assert speeds["conv_float32"] > 1e6
    assert second.succeeded().json["facts"]["speeds"] == speeds
    assert again.succeeded().json["facts"]["speeds"] != speeds
    assert Facts.from_json(saved).to_dict() == found["facts"]

    assert set(found["facts"]["canaries"].values()) == {"passed"}
    assert found["faults"] == []
    assert again.json["facts"]["canaries"] == second.json["facts"]["canaries"] == found["facts"]["canaries"]
    (kept,) = cache.glob("canaries/*.json")
    kept.write_text('{"of": "another machine"}')
    (kept,) = cache.glob("speeds/*.json")
    kept.write_text('{"conv_float32": -1}')
    rebuilt, table = sfumato_each([["doctor", "--json"], ["doctor"]], **options)
    assert str(kept) in rebuilt.succeeded().err
    assert str(next(cache.glob("canaries/*.json"))) in rebuilt.err
    assert json.loads(kept.read_text()) == rebuilt.json["facts"]["speeds"]
    for word in ("torch", torch.__version__, "GFLOP/s", "conv", "attention", "bfloat16", "memory", "canaries passed"):
        assert word in table.succeeded().out


def test_what_computes_wrongly_is_named(sfumato_each, tmp_path):
    path = tmp_path / "mac.json"
    values = machine("m5-24gb").to_dict() | {"canaries": {"conv float32": "off by 23.0%", "norm float32": "passed"}}
    path.write_text(json.dumps(values))
    shown, planned, as_json = sfumato_each(
        [
            ["doctor", "--facts", path],
            ["plan", "x", "-m", "sd15", "--facts", path],
            ["doctor", "--facts", path, "--json"],
        ],
        cwd=tmp_path,
        env={"SFUMATO_CACHE": str(tmp_path / "cache")},
    )
    assert "1 of 2 canaries passed" in shown.succeeded().out
    (fault,) = as_json.succeeded().json["faults"]
    assert "canary 'conv': off by 23.0%" in fault
    for text in (shown.out, planned.succeeded().out):
        assert fault in " ".join(text.split())


def test_other_machines(sfumato_each, tmp_path):
    old = tmp_path / "old.json"
    values = machine("m1-8gb").to_dict() | {
        "system_version": "12.1",
        "architecture": "x86_64",
        "accelerator": "cpu",
        "unified_memory": False,
        "libraries": {"torch": "1.13.1"},
    }
    old.write_text(json.dumps(values))
    commands = [["doctor", "--facts", name] for name in machine_names()]
    commands += [["doctor", "--facts", old], ["doctor", "--facts", "abacus"]]
    *shipped, ill, unknown = sfumato_each(commands, cwd=tmp_path, env={"SFUMATO_CACHE": str(tmp_path / "cache")})
    for name, outcome in zip(machine_names(), shipped, strict=True):
        text = outcome.succeeded().out
        assert machine(name).name in text
        assert "missing" not in text
        assert ("2**32" in text) == (machine(name).accelerator == "mps")
    text = ill.succeeded().out
    for word in ("update macOS to 13 or newer", "brew install python", "pip install --upgrade 'torch>=2.6'", "Metal"):
        assert word in text
    assert text.count("missing") == 4
    unknown.failed(2, "there is no machine 'abacus'", "m1-8gb")
    assert not (tmp_path / "cache").exists()
