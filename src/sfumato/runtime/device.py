"""Selects the device and the precision."""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    "sent",
]

# Options of mallopt (malloc.h).
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
    """Parse a device name; None is the best device present. Raises `UsageError` if it is unknown or absent."""
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
    """Convert to a torch device, present or not; None is the CPU. Raises `UsageError` if that is not possible."""
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
    """Return whether Metal can allocate. Virtual Macs list a Metal device that cannot (runner-images #9918)."""
    try:
        torch.empty(1, device="mps")
    except RuntimeError:
        return False
    return True


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Parse a dtype name; None and "auto" give None. Raises `UsageError` for an unknown name."""
    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r}{suggest(name, DTYPES)}; use float32, float16 or bfloat16")
    return DTYPES[name]


def check_dtype(dtype: object) -> None:
    """Raise `UsageError` unless this is a floating-point dtype."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a precision such as torch.float16, not {shown(dtype)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's plain name, such as "float16". Raises `UsageError` for anything else."""
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype must be a precision such as torch.float16, not {shown(dtype)}")
    return str(dtype).removeprefix("torch.")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest safe dtype: float16 on CUDA; float32 on CPUs, and on MPS, where attention can overflow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def ran_out_of_memory(error: Exception) -> bool:
    """Return whether an exception means out of memory; on a CPU, only torch's message says so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Make the C library keep large freed tensors for reuse inside this context.

    By default it returns them to the system, which hands them out again page by page, zeroed: a fifth of the decoding
    time. Only affects the GNU C library; others reuse memory by default. On exit, thresholds are set to the values that
    it adapts to itself (mallopt(3)), 32 MiB for mmap and twice that for trimming, and unused memory is released.
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


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. To CUDA from pinned memory, so that the host does not wait for queued work."""
    pins = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pins else x.to(device)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def release_memory(device: torch.device) -> None:
    """Release cached memory: torch's cache on an accelerator, the C library's on a CPU."""
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # C libraries other than GNU's return it by default
            _c_library().malloc_trim(0)
    elif device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
