"""The machine's matrix multiplication speed: measured once and cached, or estimated from its hardware."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sfumato.cache import keep
from sfumato.runtime.facts import kept_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sfumato.kernels import Kernels
    from sfumato.runtime.facts import Facts

__all__ = [
    "COMPILE_GAIN",
    "KINDS",
    "SECONDS_TO_COMPILE",
    "keep_speeds",
    "measure_speeds",
    "speed",
]

KINDS = ("conv", "linear", "attention")
# How long compiling takes, and the share of the run time that it saves.
COMPILE_GAIN = {"cpu": 0.11, "cuda": 0.17, "mps": 0.0}
SECONDS_TO_COMPILE = {"cpu": 80.0, "cuda": 60.0, "mps": 60.0}

# Operations per second of one core with its best instruction set: what whole networks reach, not the peak.
_CORE = (
    ("amx_bf16", "bfloat16", 1.0e12),
    ("avx512_bf16", "bfloat16", 4.5e11),
    ("neon_bf16", "bfloat16", 1.0e11),
    ("avx512", "float32", 1.5e11),
    ("avx2", "float32", 6.0e10),
    ("neon", "float32", 4.0e10),
)
_PLAIN_CORE = 1.0e10
# Defaults for a GPU that has not been measured.
_DEVICE = {"cuda": {"float32": 8.0e12, "float16": 3.0e13, "bfloat16": 3.0e13}, "mps": {"float32": 1.5e12}}
_UNKNOWN_DEVICE = 2.0e12
# On CPUs, attention runs at about a third of the speed of matrix multiplication.
_ATTENTION_SHARE = {"cpu": 0.35, "cuda": 1.0, "mps": 0.5}

# The size of the measurement: large enough to be accurate, small enough to take a few seconds in total.
ROUNDS, LEAST_SECONDS, MOST_SECONDS = 3, 0.05, 1.0
SCALE = {"cpu": 64, "mps": 256, "cuda": 4096}


def speed(facts: Facts, device: str, threads: int | None, kind: str, dtype: str) -> float:
    """Return the operations per second for a kind of layer, measured or else estimated."""
    measured = facts.speeds.get(f"{kind}_{dtype}") if device == facts.accelerator else None
    if measured is not None:
        return measured
    share = _ATTENTION_SHARE[device] if kind == "attention" else 1.0
    if device != "cpu":
        return share * _DEVICE[device].get(dtype, _UNKNOWN_DEVICE)
    core = next((rate for name, of, rate in _CORE if of == dtype and name in facts.instructions), _PLAIN_CORE)
    return share * core * (threads or facts.free_cores)


def keep_speeds(facts: Facts, speeds: Mapping[str, float]) -> None:
    """Save measured speeds in the cache, if there is one."""
    keep(kept_name(facts), dict(speeds))


def measure_speeds(device: str, threads: int | None = None) -> dict[str, float]:
    """Measure operations per second of convolution, linear layer and attention for each dtype. Takes a few seconds."""
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
    """Return the best of a few rounds, in operations per second; None if there is no such kernel.

    The first round is small. If it shows that a large one would take too long, its result is used.
    """
    import torch

    best = 0.0
    with torch.no_grad():
        for scale in (1, *((SCALE[device],) * ROUNDS)):
            try:
                work, operations = _work(kind, device, dtype, scale)
                work()  # warm-up: the kernel is chosen on the first call
                seconds = _timed(work, device)
            except RuntimeError:
                return best or None
            best = max(best, operations / seconds)
            if scale == 1 and seconds * SCALE[device] > MOST_SECONDS:
                return best
    return best


def _work(kind: str, device: str, dtype: Any, scale: int) -> tuple[Callable[[], object], int]:
    """Return a function to time, with shapes from Stable Diffusion's U-Net, and its number of operations."""
    import torch
    import torch.nn.functional as F

    from sfumato.runtime.onednn import multiply, packed_matrix

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
        if kernels is not None:  # as in the onednn engine
            packed = packed_matrix(weight)
            return lambda: multiply(x, packed, None), 2 * rows * 1280 * 1280
        return lambda: F.linear(x, weight), 2 * rows * 1280 * 1280
    length = 64 * int(scale**0.5)
    q, k, v = (random(1, 8, length, 64) for _ in range(3))
    attention = F.scaled_dot_product_attention if kernels is None else kernels.attention
    return lambda: attention(q, k, v), 4 * 8 * 64 * length * length


def _kernels(device: str, dtype: Any) -> Kernels | None:
    """Return our own kernels if a plan would use them."""
    from sfumato.kernels import CompilerError, kernels_for
    from sfumato.runtime.onednn import packable

    if device != "cpu" or not packable(dtype):
        return None
    try:
        return kernels_for(dtype)
    except CompilerError:
        return None  # doctor reports what is missing


def _timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds per run, averaged over enough runs to be timed accurately."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    wait()
    began, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < LEAST_SECONDS:
        work()
        wait()
        runs += 1
    return elapsed / runs
