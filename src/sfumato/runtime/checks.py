"""Sfumato's requirements, checked against the machine; each problem comes with the command that fixes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.kernels.build import shipped
from sfumato.runtime.quirks import release
from sfumato.runtime.speeds import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.runtime.facts import Facts

__all__ = ["Check", "check_machine", "dtype_support"]

# A dtype that reaches this share of float32's speed is native; emulation is far slower.
NATIVE_SHARE = 0.5


@dataclass(frozen=True)
class Check:
    """The result of a check: "good", "poor" (works, but could be better) or "missing". mend: how to fix it."""

    name: str
    state: str
    found: str
    mend: str = ""


def check_machine(facts: Facts) -> tuple[Check, ...]:
    """Check everything that determines whether, and how fast, this machine can generate images."""
    return (*_software(facts), *(_apple(facts) if facts.system == "macos" else ()), *_hardware(facts))


def _software(facts: Facts) -> Iterator[Check]:
    new = release(facts.python) >= (3, 11)
    yield Check("Python", "good" if new else "missing", facts.python, "" if new else "install Python 3.11 or newer")
    torch = facts.libraries.get("torch")
    if torch is None or release(torch) < (2, 0):
        yield Check("torch", "missing", torch or "not installed", "pip install --upgrade 'torch>=2.6'")
    elif release(torch) < (2, 6):
        yield Check("torch", "poor", torch, "pip install --upgrade 'torch>=2.6'")
    else:
        yield Check("torch", "good", torch)


def _apple(facts: Facts) -> Iterator[Check]:
    """Check the requirements of Apple silicon."""
    macos = release(facts.system_version)
    if macos < (12, 6):
        yield Check("macOS", "missing", facts.system_version, "update macOS to 13 or newer (12.6 at least)")
    elif macos < (13,):
        yield Check("macOS", "poor", facts.system_version, "update macOS to 13 or newer")
    else:
        yield Check("macOS", "good", facts.system_version)
    apple = facts.processor.startswith("Apple")
    if facts.architecture == "arm64":
        yield Check("arm64 Python", "good", "arm64")
    elif apple:
        mend = "install an arm64 Python (brew install python); this one runs under Rosetta, without Metal"
        yield Check("arm64 Python", "missing", facts.architecture, mend)
    else:
        yield Check(
            "Apple silicon", "poor", facts.processor, "this Mac has no Apple GPU; images are generated on its CPU"
        )
    if facts.accelerator == "mps":
        yield Check("Metal (MPS)", "good", facts.accelerator_name or "present")
    elif apple:
        mend = (
            "reinstall torch (pip install --upgrade --force-reinstall torch) in an arm64 Python on macOS 12.6 or newer"
        )
        yield Check("Metal (MPS)", "missing", "torch was built without it, or macOS is too old", mend)


def _hardware(facts: Facts) -> Iterator[Check]:
    if facts.accelerator == "cuda":
        capability = ".".join(map(str, facts.compute_capability or ()))
        yield Check("GPU", "good", f"{facts.accelerator_name}, compute capability {capability}")
        yield _memory("GPU memory", facts.accelerator_memory_free or 0, facts.accelerator_memory_total or 0)
    yield Check("processor", "good", f"{facts.processor}, {facts.architecture}")
    sets = ", ".join(facts.instructions)
    if facts.architecture == "x86_64" and "avx2" not in facts.instructions:
        yield Check(
            "instructions",
            "poor",
            sets or "none that Sfumato uses",
            "nothing can be done; without AVX2, generation is slow",
        )
    else:
        yield Check("instructions", "good", sets or "none that Sfumato uses")
    if facts.accelerator == "cpu" and facts.architecture == "x86_64":
        if facts.onednn:
            yield Check("oneDNN operations", "good", "present and correct")
        else:
            mend = "upgrade torch (pip install --upgrade torch), or install an older release"
            yield Check("oneDNN operations", "poor", "missing or incorrect; torch's own layers are used", mend)
    crowded = facts.free_cores <= facts.cores // 2
    found = (
        f"{facts.cores}, {facts.load:.1f} busy with other processes"
        if facts.load >= 0.1
        else f"{facts.cores}, all free"
    )
    yield Check("cores", "poor" if crowded else "good", found, "close other CPU-heavy programs" if crowded else "")
    yield _memory("memory", facts.memory_free, facts.memory_total)
    if facts.compiler is None and shipped("float32") is not None:
        yield Check("C compiler", "good", "none; the kernels came with the package")
    elif facts.compiler is None and facts.accelerator == "cpu":
        install = {"linux": "sudo apt install gcc", "macos": "xcode-select --install"}
        mend = install.get(facts.system, "install the Visual Studio build tools")
        yield Check("C compiler", "poor", "none; torch's slower kernels are used", mend)
    else:
        yield Check("C compiler", "good", facts.compiler or "none, but none is needed")


def _memory(name: str, free: int, total: int) -> Check:
    scarce = free < 3 * 10**9  # what Stable Diffusion 1.5 needs in half precision, one network at a time
    found = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    return Check(name, "poor" if scarce else "good", found, "close other programs to free memory" if scarce else "")


def dtype_support(facts: Facts) -> dict[str, str]:
    """Return the support for each dtype: native, emulated (and how slow), no kernels, or not measured."""
    support = {}
    for dtype in ("float32", "bfloat16", "float16"):
        ratios = [
            facts.speeds[f"{kind}_{dtype}"] / facts.speeds[f"{kind}_float32"]
            for kind in KINDS
            if f"{kind}_{dtype}" in facts.speeds and f"{kind}_float32" in facts.speeds
        ]
        if not ratios:
            support[dtype] = "no kernels" if facts.speeds else "not measured"
        elif min(ratios) < NATIVE_SHARE:
            support[dtype] = f"emulated, down to 1/{1 / min(ratios):,.0f} of float32's speed"
        else:
            support[dtype] = f"native, {sorted(ratios)[len(ratios) // 2]:.1f} times float32's speed"
    return support
