"""The processor: its name, instruction sets and caches, and the C compiler."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["caches", "compiler", "instruction_sets", "processor_name", "system_build"]

# Our names, and the names used by torch, the Linux kernel (x86 "flags", Arm "Features") and macOS.
_NAMES = {
    "avx2": ("avx2", "hw.optional.avx2_0"),
    "avx512": ("avx512_f", "avx512f", "hw.optional.avx512f"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("neon", "asimd", "hw.optional.neon", "hw.optional.AdvSIMD"),
    "neon_bf16": ("bf16", "hw.optional.arm.FEAT_BF16"),
}


def instruction_sets() -> tuple[str, ...]:
    """Return which of `avx2 avx512 avx512_vnni avx512_bf16 amx_bf16 neon neon_bf16` the CPU supports."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        found = {name for name, value in ask().items() if value is True}
    elif sys.platform == "linux":
        text = _read(Path("/proc/cpuinfo"))
        found = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)).split())
    elif sys.platform == "darwin":
        found = {name for names in _NAMES.values() for name in names if _sysctl(name) == "1"}
    else:
        level = torch.backends.cpu.get_cpu_capability()
        found = {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512_f"}}.get(level, set())
    return tuple(ours for ours, names in _NAMES.items() if not found.isdisjoint(names))


def processor_name() -> str:
    """Return the CPU's model name, as precisely as the system reports it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def system_build() -> str | None:
    """The build of macOS, such as "25C56": its kernels change with it; None elsewhere."""
    return (_sysctl("kern.osversion") or None) if sys.platform == "darwin" else None


def caches(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Return the sizes of one core's L2 cache and the shared L3 cache in bytes; None if absent."""
    if sys.platform == "darwin":
        found = [_sysctl(name) for name in ("hw.perflevel0.l2cachesize", "hw.l2cachesize", "hw.l3cachesize")]
        sizes = [int(text) if text.isdigit() and int(text) > 0 else None for text in found]
        return sizes[0] or sizes[1], sizes[2]
    levels: dict[str, int] = {}
    for folder in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = re.fullmatch(r"(\d+)([KM])", _read(folder / "size").strip())
        if size and _read(folder / "type").strip() != "Instruction":
            levels[_read(folder / "level").strip()] = int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]]
    return levels.get("2"), levels.get("3")


def compiler() -> str | None:
    """Return the path of the C compiler for our kernels, else of one that torch.compile can use, else None."""
    from sfumato.kernels.build import compiler as of_kernels

    return of_kernels() or shutil.which("cl")


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
