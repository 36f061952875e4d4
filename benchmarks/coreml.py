"""Core ML on any system: what converting takes, how large packages are, and how fast the portable runtime runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Result, seconds
from sfumato.bench.timing import alternate, timed
from sfumato.coreml.formats import read_model
from sfumato.coreml.probes import answer, probes
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.source import open_source

__all__ = ["conversion", "execution"]

PLACE = Path("out") / "coreml"
# Name of a folder, its options, and what is converted with them.
CASES = {
    "split_einsum": ("--attention-implementation", "SPLIT_EINSUM"),
    "original": ("--attention-implementation", "ORIGINAL", "--convert-unet"),
    "chunked": ("--chunk-unet", "--convert-unet"),
    "6-bit": ("--quantize-nbits", "6", "--convert-unet"),
    "chunked, 6-bit": ("--chunk-unet", "--quantize-nbits", "6", "--convert-unet"),
}
GB = 1e9

# Runs a command and prints the most memory it held, its mapped files included.
CHILD = """
import json, sys, time
from sfumato.bench.timing import peak_memory
from sfumato.cli.main import app
began = time.perf_counter()
try:
    app(json.loads(sys.argv[1]), standalone_mode=False)
finally:
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory()}))
"""


def conversion(folder: Path) -> list[Result]:
    """Each case converted in a process of its own, and then verified in another."""
    results = []
    weights = open_source(folder).sizes.unet.parameters * 2
    for name, options in CASES.items():
        place = PLACE / name.replace(", ", "-")
        shutil.rmtree(place, ignore_errors=True)
        found = _run("coreml", "convert", str(folder), "-o", str(place), "--no-verify", "--quiet", *options)
        size = sum(file.stat().st_size for path in place.glob("*_unet*") for file in path.rglob("*") if file.is_file())
        what = f"converting, {name}" + ("" if "--convert-unet" in options else ", all four networks")
        results.append(_memory(f"{what}: peak memory (target)", found["peak"], 10 * GB))
        results.append(Result(f"{what}: time (of the peak's 10 minutes)", seconds(found["seconds"]), "600 s",
                              found["seconds"] / 600))  # fmt: skip
        results.append(_memory(f"U-Net, {name}: bytes on disk (bytes of the float16 weights)", size, weights))
    found = _run("coreml", "verify", str(PLACE / "split_einsum"), "--against", str(folder), "--no-picture", "--json")
    results.append(_memory("verifying, split_einsum: peak memory (target)", found["peak"], 10 * GB))
    return results


def execution(folder: Path, runs: int) -> list[Result]:
    """The U-Net's package in the portable runtime against the network it was made from, in torch, both in float32."""
    source = open_source(folder)
    network = source.load("unet", torch.float32)
    results = []
    for name in ("split_einsum", "original", "6-bit"):
        (path,) = (PLACE / name).glob("*_unet.mlpackage")
        began = time.perf_counter()
        predictor = Predictor(read_model(path), precision="float32")
        loading = time.perf_counter() - began
        probe = probes("unet", predictor.interface, source)[0]
        calls: dict[str, Any] = {
            "ours": timed(lambda predictor=predictor, probe=probe: predictor.run(probe)),
            "torch": timed(lambda probe=probe: answer("unet", network, probe)),
        }
        times = alternate(calls, runs)
        results.append(
            Result(f"loading the U-Net's package, {name} (target)", seconds(loading), "3 s", loading / 3, most=1)
        )
        results.append(
            Result.of_times(f"U-Net call in the runtime, {name} (torch, float32)", times["ours"], times["torch"], 1.1)
        )
    return results


def _run(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _memory(what: str, ours: float, theirs: float) -> Result:
    most = 1.0 if "target" in what else None
    return Result(what, f"{ours / GB:.2f} GB", f"{theirs / GB:.2f} GB", ours / theirs, most=most)
