"""What a machine is: facts read from files, from control groups as the kernel writes them, and from this machine."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from importlib.metadata import version

import pytest

from sfumato.cache import cache_folder
from sfumato.errors import ConfigError, SfumatoError, UsageError
from sfumato.runtime import limits, speeds
from sfumato.runtime.checks import check_machine, dtype_support
from sfumato.runtime.device import _metal_gives_memory, parse_device
from sfumato.runtime.facts import Facts, cached_speeds, facts_named, machine, machine_names, read_facts
from sfumato.runtime.limits import ControlGroups, thread_limit, whole_cores
from sfumato.runtime.processor import caches
from sfumato.runtime.quirks import release


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ControlGroups(root)


GIB = 2**30
V2 = {
    "proc/self/cgroup": "0::/user.slice/job\n",
    "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/user.slice/job/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/job/memory.current": f"{2 * GIB}\n",
    "sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/box\n3:cpuset:/\n1:cpu,cpuacct:/box\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{6 * GIB}\n",
    "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n",
    "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
    "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "free", "limit", "quota"),
    [
        (V2, 6 * GIB, 8 * GIB, 1.5),
        (V1, 4 * GIB, 6 * GIB, 3.0),
        # A container that mounts its own group at the top: the path named is not there, its limit is.
        (
            {
                "proc/self/cgroup": "0::/elsewhere/deep\n",
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
            },
            0,
            GIB,
            None,
        ),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n"}, 4 * GIB, 6 * GIB, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "nonsense\n"}, None, None, None),
        ({}, None, None, None),
    ],
)
def test_control_groups(tmp_path, files, free, limit, quota):
    groups = write(tmp_path, files)
    assert (groups.free_memory(), groups.memory_limit(), groups.cpu_quota()) == (free, limit, quota)


def test_two_threads_of_one_core_are_one_core(tmp_path):
    place = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {place.format(cpu): f"{cpu % 2},{cpu % 2 + 2}\n" for cpu in range(4)})
    assert whole_cores((0, 1, 2, 3), tmp_path) == 2
    assert whole_cores((1, 3), tmp_path) == 1
    assert whole_cores((0, 1), tmp_path / "nothing") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the files of a Linux kernel")
def test_caches(tmp_path):
    place = "sys/devices/system/cpu/cpu0/cache/"
    levels = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M")]
    files = {}
    for i, (level, kind, size) in enumerate(levels):
        files |= {f"{place}index{i}/level": level, f"{place}index{i}/type": kind, f"{place}index{i}/size": size}
    write(tmp_path, files)
    assert caches(tmp_path) == (2**20, 2**25)
    assert caches(tmp_path / "nothing") == (None, None)


def test_this_machine():
    import psutil
    import torch

    facts = read_facts("cpu")
    assert (facts.accelerator, facts.accelerator_memory_total) == ("cpu", None)
    assert 0 < facts.memory_free <= facts.memory_total <= psutil.virtual_memory().total
    assert 1 <= facts.free_cores <= facts.cores <= psutil.cpu_count()
    assert facts.libraries["torch"] == version("torch")
    assert ("avx2" in facts.instructions) == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    with pytest.raises(UsageError, match="xpu"):
        read_facts("xpu")


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced there")
def test_an_address_space_limit_is_seen():
    code = """
import psutil, resource, torch
from sfumato.runtime.facts import read_facts
limit = psutil.Process().memory_info().vms + 2**30  # a build for CUDA takes more addresses than one for the CPU
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
facts = read_facts("cpu")
print(facts.memory_free, facts.memory_total, facts.address_limited, limit, psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, total, limited, limit, own = done.stdout.split()
    assert limited == "True"
    assert int(own) < int(free) < int(own) + 2**30
    assert int(free) < int(total) <= int(limit)


@pytest.mark.parametrize("name", machine_names())
def test_shipped_machines(name, tmp_path):
    facts = machine(name)
    memory = [(facts.memory_free, facts.memory_total)]
    if facts.accelerator == "cuda":
        memory.append((facts.accelerator_memory_free, facts.accelerator_memory_total))
    for free, total in memory:
        assert 0.4 * total < free < 0.97 * total
    path = tmp_path / "facts.json"
    facts.to_json(path)
    assert Facts.from_json(path) == facts == facts_named(str(path)) == facts_named(name)
    assert {check.name for check in check_machine(facts)} >= {"Python", "torch", "memory", "processor"}
    assert all(check.state == "good" for check in check_machine(facts) if check.name not in ("memory", "C compiler"))
    assert dtype_support(facts)["float32"].startswith("native")


def test_the_machines_that_are_promised():
    wanted = {
        "t4-16gb",
        "rtx-4090",
        "h100",
        "h200",
        "m1-8gb",
        "m2-16gb",
        "m3-max-64gb",
        "m4-16gb",
        "m5-24gb",
        "laptop-8gb",
    }
    assert set(machine_names()) == wanted
    with pytest.raises(UsageError, match="did you mean 'm1-8gb'"):
        machine("m1-8g")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory_free": -1}, ["memory_free", "-1"]),
        ({"memory_free": 2**60}, ["memory_free"]),
        ({"memory_free": 2**40}, ["memory_free", "memory_total"]),
        ({"memory_total": "8 GB"}, ["memory_total", "'8 GB'"]),
        ({"memory_total": True}, ["memory_total"]),
        ({"cores": 0}, ["cores"]),
        ({"cores": 2.5}, ["cores"]),
        ({"load": float("nan")}, ["load"]),
        ({"system": "plan9"}, ["system", "'linux'"]),
        ({"accelerator": "npu"}, ["accelerator", "'npu'"]),
        ({"accelerator": "cuda"}, ["compute_capability"]),
        ({"accelerator": "mps"}, ["macos"]),
        ({"compute_capability": [8]}, ["compute_capability"]),
        ({"accelerator_memory_free": 5}, ["accelerator_memory_total"]),
        ({"instructions": "avx2"}, ["instructions"]),
        ({"libraries": {"torch": 2}}, ["libraries"]),
        ({"speeds": {"conv_float32": -5.0}}, ["speeds"]),
        ({"name": ""}, ["name"]),
        ({"python": None}, ["python"]),
        ({"memory_fre": 5}, ["memory_fre", "did you mean 'memory_free'"]),
    ],
)
def test_nonsense_is_named(tmp_path, changes, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(machine("laptop-8gb").to_dict() | changes))
    with pytest.raises(ConfigError) as caught:
        Facts.from_json(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    values = machine("laptop-8gb").to_dict()
    for field in dataclasses.fields(Facts):
        path = tmp_path / f"{field.name}.json"
        path.write_text(json.dumps({key: value for key, value in values.items() if key != field.name}))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(ConfigError, match=f"{field.name} is missing"):
                Facts.from_json(path)
        else:
            assert Facts.from_json(path).name
    for text in ("", "[]", "{"):
        path.write_text(text)
        with pytest.raises(UsageError, match="JSON object of facts"):
            Facts.from_json(path)
    with pytest.raises(UsageError, match="absent"):
        Facts.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("wanted", "limit"), [("1", 1), ("64", 64), ("0", None), ("", None), ("many", None), ("2,1", None)]
)
def test_the_users_limit_on_threads_is_kept(monkeypatch, wanted, limit):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert thread_limit() == limit
    assert read_facts("cpu").cores == min(limit or 2**31, whole_cores(limits.usable_cpus()))


def test_a_metal_device_without_memory_is_not_there(monkeypatch):
    """Virtual Macs name one."""
    import torch

    def refuse(*_, **__):
        raise RuntimeError("MPS backend out of memory (max allowed: 7.93 GB). Tried to allocate 256 bytes")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", refuse)
    _metal_gives_memory.cache_clear()
    try:
        assert parse_device(None).type == "cpu"
        with pytest.raises(UsageError, match="'mps' is not available"):
            parse_device("mps")
    finally:
        _metal_gives_memory.cache_clear()


def test_free_cores_round_up_what_others_take():
    laptop = machine("laptop-8gb")
    for load, free in ((0.0, 4), (0.4, 4), (0.5, 3), (2.2, 2), (17.0, 1)):
        assert dataclasses.replace(laptop, load=load).free_cores == free


def test_quirks_follow_versions():
    mac = machine("m1-8gb")

    def names(**changes):
        return {quirk.name for quirk in dataclasses.replace(mac, **changes).quirks}

    assert {"mps-buffer-limit", "mps-half-overflow", "mps-sliced-attention", "mps-fused-widths"} <= names()
    assert {"mps-long-reduction", "mps-transposed-matmul", "mps-causal-half", "mps-conv-weight-layout"} <= names()
    assert "mps-fused-attention" not in names()
    assert "mps-fused-attention" in names(libraries={"torch": "2.12.1"})
    assert not {"mps-sliced-attention", "mps-transposed-matmul"} & names(libraries={"torch": "2.14.0"})
    for changes, refused in (
        ({}, None),
        ({"system_version": "27.1"}, None),
        ({"system_version": "27.1", "libraries": {"torch": "2.12.0"}}, "mps-macos27"),
        ({"system_version": "26.6", "libraries": {"torch": "2.12.0"}}, None),
        ({"architecture": "x86_64"}, "mps-intel-amd"),
    ):
        found = dataclasses.replace(mac, **changes).refused
        assert (found and found.name) == refused
    assert "mps-half-overflow" not in names(system_version="14.4")
    assert "mps-sliced-attention" not in names(libraries={"torch": "2.3.1"})
    assert "mps-priming" in names(libraries={"torch": "1.13.1"})
    assert "mps-priming" not in names()
    assert [quirk.name for quirk in machine("laptop-8gb").quirks] == ["cpu-float16"]
    assert machine("h200").quirks == ()
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("none") == ()


def test_the_guides_list_for_macs():
    mac = machine("m1-8gb")

    def found(**changes):
        return {check.name: check for check in check_machine(dataclasses.replace(mac, **changes))}

    assert found(system_version="12.5")["macOS"].state == "missing"
    assert found(system_version="12.6")["macOS"].state == "poor"
    translated = found(architecture="x86_64", accelerator="cpu", unified_memory=False)
    assert translated["arm64 Python"].state == translated["Metal (MPS)"].state == "missing"
    assert "brew install python" in translated["arm64 Python"].mend
    assert found(libraries={"torch": "1.13.1"})["torch"].state == "missing"
    assert found(libraries={"torch": "2.1.0"})["torch"].state == "poor"
    assert found(libraries={})["torch"].mend.startswith("pip install")


def test_speeds_are_kept_and_a_damaged_file_is_replaced(caplog):
    facts = read_facts("cpu")
    assert facts.speeds == {}
    speeds.keep_speeds(facts, {"conv_float32": 1e11})
    path = cache_folder() / speeds.kept_name(facts)
    assert path.is_file()
    assert read_facts("cpu").speeds == {"conv_float32": 1e11}
    other = dataclasses.replace(facts, libraries={"torch": "0.0"})
    assert cached_speeds(other) == {}
    for damage in ("{", '{"conv_float32": "fast"}'):
        path.write_text(damage)
        with caplog.at_level(logging.WARNING, "sfumato"):
            assert read_facts("cpu").speeds == {}
        assert str(path) in caplog.text
        assert not path.exists()
        caplog.clear()


def test_measured_speeds_are_what_torch_reaches(monkeypatch):
    import torch

    monkeypatch.setattr(speeds, "SCALE", {"cpu": 4})
    monkeypatch.setattr(speeds, "LEAST_SECONDS", 0.002)
    threads = torch.get_num_threads()
    found = speeds.measure_speeds("cpu", 1)
    assert torch.get_num_threads() == threads
    assert {f"{kind}_{dtype}" for kind in speeds.KINDS for dtype in ("float32", "bfloat16")} <= set(found)
    assert all(1e6 < rate < 1e14 for rate in found.values())


@pytest.mark.parametrize(
    ("system", "environment", "place"),
    [
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/sfumato"),
        ("linux", {}, "~/.cache/sfumato"),
        ("darwin", {}, "~/Library/Caches/sfumato"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/sfumato"),
        ("linux", {"SFUMATO_CACHE": "~/mine", "XDG_CACHE_HOME": "/caches"}, "~/mine"),
    ],
)
def test_where_the_cache_is(monkeypatch, system, environment, place):
    from pathlib import Path

    for name in ("SFUMATO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache_folder() == Path(place).expanduser()


def test_every_error_is_a_sentence():
    with pytest.raises(SfumatoError, match=r"use one of .*h200"):
        facts_named("abacus")
