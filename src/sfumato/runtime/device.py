"""Selects the device and the precision."""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError, suggest
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DTYPES",
    "as_device",
    "check_dtype",
    "default_dtype",
    "dtype_name",
    "parse_device",
    "parse_dtype",
    "ran_out_of_memory",
    "release_memory",
    "reused_memory",
]

# mallopt's options (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def parse_device(name: str | None) -> torch.device:
    """A device by name, or the best one present if None. Raises `UsageError` if it is unknown or absent."""
    if name is None or (isinstance(name, str) and name == "auto"):
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _present(kind)))
    if not isinstance(name, str | torch.device):
        raise UsageError(f"device must be a name such as 'cuda', not {shown(name)}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"there is no device {name!r}{suggest(name, ['cuda', 'mps', 'cpu'])}; use cuda, mps or cpu"
        ) from error
    if not _present(device.type):
        here = ", ".join(kind for kind in ("cuda", "mps", "cpu") if _present(kind))
        raise UsageError(f"device {name!r} is not available, or torch was built without it; available: {here}")
    return device


def as_device(device: Any) -> torch.device:
    """A device for tensors, available or not; the CPU if None. Raises `UsageError` for what is none."""
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"device must be a name such as 'cpu' or 'cuda', not {shown(device)}") from error


def _present(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available() and _metal_gives_memory()
    return kind == "cpu"


@cache
def _metal_gives_memory() -> bool:
    """Virtual Macs name a Metal device, and every allocation on it fails (runner-images #9918)."""
    try:
        torch.empty(1, device="mps")
    except RuntimeError:
        return False
    return True


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A precision by name; None and "auto" stay None. Raises `UsageError` for an unknown one."""
    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r}{suggest(name, DTYPES)}; use float32, float16 or bfloat16")
    return DTYPES[name]


def check_dtype(dtype: object) -> None:
    """Raise `UsageError` unless this is a precision that weights can have."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a precision such as torch.float16, not {shown(dtype)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The way back: a precision's plain name, "float16"."""
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype must be a precision such as torch.float16, not {shown(dtype)}")
    return str(dtype).removeprefix("torch.")


def default_dtype(device: torch.device) -> torch.dtype:
    """The fastest safe precision: float16 on CUDA; float32 on a CPU and on MPS, whose attention overflows in half."""
    return torch.float16 if device.type == "cuda" else torch.float32


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory ran out; on a CPU, torch says so in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within the block the C library keeps large tensors that are freed for the next one of their size.

    Otherwise it returns them to the system, which hands them out again page by page, cleared: a fifth of the time of
    decoding an image. GNU's library only; others keep memory by themselves. Afterwards its thresholds are those it
    settles on by itself (mallopt(3)), 32 MiB for maps and twice that for trimming, and what was kept is given back.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    change(M_MMAP_THRESHOLD, 2**30)
    change(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        change(M_MMAP_THRESHOLD, 2**25)
        change(M_TRIM_THRESHOLD, 2**26)
        release_memory(torch.device("cpu"))


def release_memory(device: torch.device) -> None:
    """Give back what was freed but is kept for later: by torch on an accelerator, by the C library on a CPU."""
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries than GNU's return it by themselves
            ctypes.CDLL(None).malloc_trim(0)
    elif device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
