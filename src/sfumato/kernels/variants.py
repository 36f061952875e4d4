"""The kernels that platform wheels contain in compiled form, for machines without a C compiler.

The build hook (`hatch_build.py`) runs this file on its own, so it imports only the standard library.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COMPILE", "UNITS", "VARIANTS", "Variant", "build_variants", "compiler", "fitting", "processor_flags"]

UNITS = ("attention.c", "normalize.c")
# The flags of local builds, except those for the processor. OpenMP is the one that torch has already loaded.
COMPILE = ("-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
LINK = ("-shared", "-lm", "-Wl,--strip-all")
_V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Variant:
    """A library. machine: as in `platform.machine()`; features: required CPU features, as in `/proc/cpuinfo`."""

    dtype: str
    name: str
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """The file name in the folder `built`."""
        return f"{self.dtype}-{self.machine}-{self.name}.so"


# Fastest first for each dtype. In bfloat16, the kernels need the processor's bfloat16 products (vector.h).
VARIANTS = (
    Variant(
        "bfloat16", "amx", "x86_64", _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"},
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DBFLOAT16"),
    ),
    Variant(
        "bfloat16", "avx512-bf16", "x86_64", _V4 | {"avx512_bf16"},
        ("-march=x86-64-v4", "-mavx512bf16", "-DBFLOAT16"),
    ),
    Variant("float32", "avx512", "x86_64", _V4, ("-march=x86-64-v4",)),
    Variant("float32", "avx2", "x86_64", _V3, ("-march=x86-64-v3",)),
)  # fmt: skip


def compiler() -> str | None:
    """Return the C compiler to use: `$CC`, or the first of cc, gcc and clang on the path; None if there is none."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def processor_flags() -> str:
    """Return the line of `/proc/cpuinfo` that names the processor's features; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def fitting(dtype: str) -> list[Variant]:
    """Return the variants that this machine can run, the fastest first. Empty on systems other than Linux."""
    if sys.platform != "linux":
        return []
    found = set(processor_flags().partition(":")[2].split())
    here = (one for one in VARIANTS if one.machine == platform.machine() and one.dtype == dtype)
    return [one for one in here if one.features <= found]


def build_variants(cc: str, sources: Path, folder: Path) -> list[Path]:
    """Compile all variants for this machine's architecture into a folder and return their paths.

    Raises `subprocess.CalledProcessError` if the compiler fails. The libraries are not linked with OpenMP: torch
    includes it, and a slim container has no other.
    """
    made = []
    for variant in VARIANTS:
        if variant.machine != platform.machine():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            objects = [str(Path(scratch, unit).with_suffix(".o")) for unit in UNITS]
            for unit, target in zip(UNITS, objects, strict=True):
                command = [cc, "-c", *COMPILE, *variant.flags, str(sources / unit), "-o", target]
                subprocess.run(command, check=True)
            made.append(folder / variant.file)
            subprocess.run([cc, *objects, *LINK, "-o", str(made[-1])], check=True)
    return made
