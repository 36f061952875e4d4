"""What is wrong with a command line is said at once: without torch, which takes seconds to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from cli.conftest import SCRIPT
from sfumato.cli.studio import early_worker

WRONG = [
    (["generate", "x", "--model", "/nope"], 1, "there is no folder /nope"),
    (["generate", "x", "--model", "sdxl-tubo"], 1, "there is no folder sdxl-tubo (did you mean 'sdxl-turbo'?)"),
    (["generate", "x", "--model", "sd15"], 1, "run 'sfumato download sd15'"),
    (["generate", "x", "--width", "100"], 2, "width must be divisible by 8, and 100 is not; try 96 or 104"),
    (["generate", "x", "--scheduler", "dmp++"], 2, "there is no scheduler 'dmp++'"),
    (["generate", "x", "--dtype", "float33"], 2, "there is no dtype 'float33'"),
    (["generate", "x", "--device", "gpu"], 2, "there is no device 'gpu'"),
    (["generate", "x", "--offload", "some"], 2, "there is no offload 'some'"),
    (["generate", "x", "--image", "nope.png"], 2, "there is no image nope.png"),
    (["generate", "x", "--output", "x.gif"], 2, "must end in .png"),
    (["generate", "x", "--stps", "3"], 2, "--stps"),
    (["generate", "x", "--fast", "abc"], 2, "--fast must be a number such as 30dB, not 'abc'"),
    (["generate", "x", "--fast", "-3dB"], 2, "--fast must be from 1dB to 100dB, not '-3dB'"),
    (["replay", "nope.png"], 2, "there is no image nope.png"),
    (["show", "/nope"], 1, "there is no folder /nope"),
    (["show", "owner/name"], 1, "run 'sfumato download owner/name'"),
    (["plan", "x", "--model", "/nope"], 1, "there is no folder /nope"),
    (["plan", "x", "--width", "100"], 2, "width must be divisible by 8"),
    (["plan", "x", "--facts", "m0"], 2, "there is no machine 'm0'"),
    (["bench", "--model", "/nope"], 1, "there is no folder /nope"),
    (["download", "/nope"], 1, "there is no folder /nope"),
    (["models", "remove", "sd15"], 2, "'sd15' is not in the cache"),
    (["coreml", "convert", "/nope"], 1, "there is no folder /nope"),
    (["coreml", "verify", "nope"], 1, "there is no folder nope"),
    (["coreml", "generate", "x", "-i", "nope"], 1, "there is no folder nope"),
]


@pytest.mark.parametrize(
    ("words", "code", "sentence"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_refused_before_torch(environment, words, code, sentence, tmp_path):
    command = [sys.executable, "-X", "importtime", SCRIPT, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    imported = set(re.findall(r"^import time:[ \d|]+\| +([\w.]+)$", done.stderr, re.MULTILINE))
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert sentence in "\n".join(said)
    assert done.returncode == code
    assert "sfumato.cli.main" in imported
    assert {"torch", "numpy"} & imported == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="reads the time of processes from the system")
def test_refused_in_less_than_half_a_second(environment, tmp_path):
    """The processor's time, which other programs on the same cores do not stretch; the best of a few runs."""
    import resource

    def used() -> float:
        times = resource.getrusage(resource.RUSAGE_CHILDREN)
        return times.ru_utime + times.ru_stime

    def taken(command: list[str]) -> float:
        began = used()
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        return used() - began

    refused = (["--model", "/nope"], ["--width", "100"], ["--stps", "3"])
    rounds = [[taken([SCRIPT, "generate", "x", *words]) for words in refused] for _ in range(2)]
    # On slow cores, a third of what they take to import torch.
    torch = min(taken([sys.executable, "-c", "import torch"]) for _ in range(2))
    assert max(map(min, zip(*rounds, strict=True))) < max(0.4, torch / 3)


def test_the_studio_s_worker_starts_before_options_are_read_and_does_not_outlive_the_command():
    for words in (["serve", "--help"], ["generate", "studio"]):
        with early_worker(words) as child:
            assert child is None
    with early_worker(["serve", "--port", "none"]) as child:
        assert child is not None
        assert child.poll() is None
    assert child.wait(10) != 0
    child.stdin.close()
    child.stdout.close()


def test_who_reads_the_message_of_a_misuse_does_not_wait_for_the_worker():
    began = time.perf_counter()
    done = subprocess.run([SCRIPT, "serve", "--port", "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "valid integer" in done.stderr
    assert time.perf_counter() - began < 5
