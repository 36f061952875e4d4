"""How fast a machine multiplies: measured once and kept in the user's cache, or estimated from what it is."""

from __future__ import annotations

import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, ConfigError, OutputError
from sfumato.files import cache_folder, output_folder, read_json, write_json
from sfumato.runtime.validation import check_speeds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sfumato.kernels import Kernels
    from sfumato.runtime.facts import Facts

__all__ = [
    "COMPILE_GAIN",
    "KINDS",
    "SECONDS_TO_COMPILE",
    "cached_speeds",
    "keep_speeds",
    "measure_speeds",
    "speed",
    "speeds_file",
]

log = logging.getLogger("sfumato")

KINDS = ("conv", "linear", "attention")
# What is measured; another number where that changes, so that older speeds are not taken for it.
MEASURED = 2
# What compiling takes, and the share of the time that it saves.
COMPILE_GAIN = {"cpu": 0.11, "cuda": 0.17, "mps": 0.0}
SECONDS_TO_COMPILE = {"cpu": 80.0, "cuda": 60.0, "mps": 60.0}

# Operations a second of one core, by the best of its instruction sets: what whole networks reach, not the peak.
_CORE = (
    ("amx_bf16", "bfloat16", 1.0e12),
    ("avx512_bf16", "bfloat16", 4.5e11),
    ("neon_bf16", "bfloat16", 1.0e11),
    ("avx512", "float32", 1.5e11),
    ("avx2", "float32", 6.0e10),
    ("neon", "float32", 4.0e10),
)
_PLAIN_CORE = 1.0e10
# A GPU of unknown speed.
_DEVICE = {"cuda": {"float32": 8.0e12, "float16": 3.0e13, "bfloat16": 3.0e13}, "mps": {"float32": 1.5e12}}
_UNKNOWN_DEVICE = 2.0e12
# Attention runs at a third of the speed of matrices on CPUs.
_ATTENTION_SHARE = {"cpu": 0.35, "cuda": 1.0, "mps": 0.5}

# What is measured: enough work to be exact, little enough that all of it takes a few seconds.
ROUNDS, LEAST_SECONDS, MOST_SECONDS = 3, 0.05, 1.0
SCALE = {"cpu": 64, "mps": 256, "cuda": 4096}


def speed(facts: Facts, device: str, threads: int | None, kind: str, dtype: str) -> float:
    """Operations a second of one kind of layer: as measured, else estimated."""
    measured = facts.speeds.get(f"{kind}_{dtype}") if device == facts.accelerator else None
    if measured is not None:
        return measured
    share = _ATTENTION_SHARE[device] if kind == "attention" else 1.0
    if device != "cpu":
        return share * _DEVICE[device].get(dtype, _UNKNOWN_DEVICE)
    core = next((rate for name, of, rate in _CORE if of == dtype and name in facts.instructions), _PLAIN_CORE)
    return share * core * (threads or facts.free_cores)


def speeds_file(facts: Facts) -> Path:
    """Where the speeds of this machine with this version of torch are kept."""
    key = (MEASURED, facts.processor, facts.accelerator_name, facts.cores, facts.system, facts.libraries.get("torch"))
    return cache_folder() / "speeds" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def cached_speeds(facts: Facts) -> Mapping[str, float]:
    """The speeds measured earlier; none if nobody has. A damaged file is deleted, and that is said."""
    path = speeds_file(facts)
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
        check_speeds(values, str(path))
    except (CheckpointError, ConfigError):
        log.warning("%s was damaged and has been deleted; 'sfumato doctor' measures this machine again", path)
        path.unlink(missing_ok=True)
        return {}
    return values


def keep_speeds(facts: Facts, speeds: Mapping[str, float]) -> Path:
    """Keep measured speeds for later; returns the file. Raises `OutputError` if it cannot be written."""
    path = speeds_file(facts)
    output_folder(path.parent)
    write_json(path, dict(speeds))
    return path


def measure_speeds(device: str, threads: int | None = None) -> dict[str, float]:
    """Operations a second of convolution, linear layer and attention in each precision; a few seconds of work."""
    import torch

    before = torch.get_num_threads()
    if threads is not None and device == "cpu":
        torch.set_num_threads(threads)
    try:
        found = {}
        for dtype in ("float32", "bfloat16", "float16"):
            for kind in KINDS:
                rate = _measure(kind, device, getattr(torch, dtype))
                if rate is not None:
                    found[f"{kind}_{dtype}"] = rate
        return found
    finally:
        torch.set_num_threads(before)


def _measure(kind: str, device: str, dtype: Any) -> float | None:
    """The best of a few rounds; None where there is no such kernel.

    The first round is small, and where it is so slow that a large one would take long, it is the result.
    """
    import torch

    best = 0.0
    with torch.no_grad():
        for scale in (1, *((SCALE[device],) * ROUNDS)):
            try:
                work, operations = _work(kind, device, dtype, scale)
                work()  # once for the kernel to be chosen
                seconds = _timed(work, device)
            except RuntimeError:
                return best or None
            best = max(best, operations / seconds)
            if scale == 1 and seconds * SCALE[device] > MOST_SECONDS:
                return best
    return best


def _work(kind: str, device: str, dtype: Any, scale: int) -> tuple[Callable[[], object], int]:
    """Something to run, of the shapes of Stable Diffusion's U-Net, and its operations."""
    import torch
    import torch.nn.functional as F

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device).to(dtype)

    kernels = _kernels(device, dtype)
    if kind == "conv":
        side = 4 * int(scale**0.5)
        x = random(2, 320, side, side).to(memory_format=torch.channels_last)
        weight = random(320, 320, 3, 3).to(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, weight, padding=1), 2 * 9 * 320 * 320 * 2 * side * side
    if kind == "linear":
        rows = 16 * scale
        x, weight = random(rows, 1280), random(1280, 1280)
        if kernels is not None:  # as the onednn engine has it
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            multiply = torch.ops.mkldnn._linear_pointwise
            return lambda: multiply(x, packed, None, "none", [], ""), 2 * rows * 1280 * 1280
        return lambda: F.linear(x, weight), 2 * rows * 1280 * 1280
    length = 64 * int(scale**0.5)
    q, k, v = (random(1, 8, length, 64) for _ in range(3))
    attention = F.scaled_dot_product_attention if kernels is None else kernels.attention
    return lambda: attention(q, k, v), 4 * 8 * 64 * length * length


def _kernels(device: str, dtype: Any) -> Kernels | None:
    """Our own kernels, where a plan would use them."""
    import torch

    from sfumato.kernels import CompilerError, kernels_for

    if device != "cpu" or dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return None
    try:
        return kernels_for(dtype)
    except (CompilerError, OutputError):
        return None  # doctor says what is missing


def _timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one run, from as many runs as take long enough to be timed."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    wait()
    began, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < LEAST_SECONDS:
        work()
        wait()
        runs += 1
    return elapsed / runs
