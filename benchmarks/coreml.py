"""Core ML on any system: time and memory of conversion, sizes of packages, and speed of the portable runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Result, seconds
from sfumato.bench.timing import alternate, timed
from sfumato.coreml.formats import read_model
from sfumato.coreml.probes import answer, probes
from sfumato.coreml.program import Function, Output
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.runtime.fuse import fused
from sfumato.coreml.runtime.planner import needed
from sfumato.coreml.source import open_source

__all__ = ["conversion", "execution", "largest_live_set", "memory"]

PLACE = Path("out") / "coreml"
# Name of a folder, its options, and what is converted with them.
CASES = {
    "split_einsum": ("--attention-implementation", "SPLIT_EINSUM"),
    "original": ("--attention-implementation", "ORIGINAL", "--convert-unet"),
    "chunked": ("--chunk-unet", "--convert-unet"),
    "6-bit": ("--quantize-nbits", "6", "--convert-unet"),
    "chunked, 6-bit": ("--chunk-unet", "--quantize-nbits", "6", "--convert-unet"),
}
PROVED = ("split_einsum", "chunked", "6-bit", "chunked, 6-bit")
PROOF = 150.0  # seconds
GB = 1e9

# Operations that give their input in another form.
VIEWS = ("reshape", "transpose", "squeeze", "expand_dims", "slice_by_index", "split")

# A command; then its seconds and the most memory it held, mapped files included.
COMMAND = """
import json, sys, time
from sfumato.bench.timing import peak_memory
from sfumato.cli.main import app
began = time.perf_counter()
code = app(json.loads(sys.argv[1]), standalone_mode=False)
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory()}))
sys.exit(code)
"""

# Two calls of a U-Net's package; then the most memory held, above what was before it.
CALL = """
import json, sys
from pathlib import Path
import psutil
from sfumato.bench.timing import peak_memory
from sfumato.coreml.formats import read_model
from sfumato.coreml.probes import probes
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.source import open_source
checkpoint, path = json.loads(sys.argv[1])
model = read_model(Path(path))
probe = probes("unet", model.interface, open_source(checkpoint))[0]
before = psutil.Process().memory_info().rss
predictor = Predictor(model, precision="float32")
for _ in range(2):
    predictor.run(probe)
print(json.dumps({"peak": peak_memory() - before}))
"""


def conversion(folder: Path) -> list[Result]:
    """Convert each case in its own process, and verify it in another."""
    results = []
    weights = open_source(folder).sizes.unet.parameters * 2
    for name, options in CASES.items():
        place = PLACE / name.replace(", ", "-")
        shutil.rmtree(place, ignore_errors=True)
        found = _run(COMMAND, "coreml", "convert", str(folder), "-o", str(place), "--no-verify", "--quiet", *options)
        size = sum(file.stat().st_size for path in place.glob("*_unet*") for file in path.rglob("*") if file.is_file())
        what = "the U-Net" if "--convert-unet" in options else "all four networks"
        time_ = seconds(found["seconds"])
        results.append(
            _memory(f"converting {what}, {name}, in {time_}: peak memory (limit)", found["peak"], 10 * GB, 1)
        )
        results.append(_memory(f"U-Net, {name}: bytes on disk (bytes of the float16 weights)", size, weights))
    for name in PROVED:
        results += _proving(folder, name)
    return results


def _proving(folder: Path, name: str) -> list[Result]:
    """Measure the verification of everything that a case converted, in its own process and without drawing an image."""
    place = PLACE / name.replace(", ", "-")
    found = _run(COMMAND, "coreml", "verify", str(place), "--against", str(folder), "--no-picture", "--quiet")
    what = f"proving {'all four networks' if name == 'split_einsum' else 'the U-Net'}, {name}"
    return [
        Result(f"{what} (limit)", seconds(found["seconds"]), f"{PROOF:g} s", found["seconds"] / PROOF, most=1),
        _memory(f"{what}: peak memory (limit)", found["peak"], 10 * GB, 1),
    ]


def memory(folder: Path) -> list[Result]:
    """Measure the peak memory of a U-Net call above that of Python and torch, compared with the least needed."""
    results = []
    for name in ("split_einsum", "original"):
        path = _unet(name)
        found = _run(CALL, str(folder), str(path))
        function = fused(read_model(path).program.functions["main"])
        weights = 4 * open_source(folder).sizes.unet.parameters
        bound = weights + 1.3 * largest_live_set(function)
        what = f"peak of a U-Net call in the runtime, {name} (float32 weights + 1.3 × largest live set)"
        results.append(_memory(what, found["peak"], bound, 1))
    return results


def largest_live_set(function: Function) -> int:
    """Bytes, in float32, of all values that are alive at once, at most; views of others take nothing.

    A value is alive from the operation that computes it to the last that reads it or a view of it.
    """
    root = {each.name: each.name for each in function.inputs}
    size = {each.name: _floats(each) for each in function.inputs}
    last: dict[str, int] = {}
    operations = [operation for operation, wanted in zip(function.operations, needed(function), strict=True) if wanted]
    for place, operation in enumerate(operations):
        known = [root[name] for name in operation.names if name in root]
        for output in operation.outputs if known else ():
            root[output.name] = known[0] if operation.type in VIEWS else output.name
            size[output.name] = 0 if operation.type in VIEWS else _floats(output)
            last[root[output.name]] = place
        last.update(dict.fromkeys(known, place))
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        ends.setdefault(place, []).append(name)
    alive = most = sum(size[each.name] for each in function.inputs)
    for place, operation in enumerate(operations):
        alive += sum(size.get(output.name, 0) for output in operation.outputs)
        most = max(most, alive)
        alive -= sum(size[name] for name in ends.get(place, ()))
    return most


def execution(folder: Path, runs: int) -> list[Result]:
    """Compare the U-Net's package in the portable runtime with its original in torch, both in float32."""
    source = open_source(folder)
    network = source.load("unet", torch.float32)
    results = []
    for name in ("split_einsum", "original", "6-bit"):
        path = _unet(name)
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


def _unet(name: str) -> Path:
    (path,) = (PLACE / name).glob("*_unet.mlpackage")
    return path


def _floats(output: Output) -> int:
    return 4 * prod(side or 0 for side in output.type.shape)


def _run(program: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _memory(what: str, ours: float, theirs: float, most: float | None = None) -> Result:
    return Result(what, f"{ours / GB:.2f} GB", f"{theirs / GB:.2f} GB", ours / theirs, most=most)
