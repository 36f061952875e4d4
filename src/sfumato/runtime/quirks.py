"""Known issues of operating systems and torch versions, and their workarounds."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Quirk", "known_quirks", "release"]


@dataclass(frozen=True)
class Quirk:
    """An issue, where it occurs, and what Sfumato does about it.

    accelerators, architectures: empty for all. It affects versions `since` ≤ v < `until` of `of` ("torch" or "system"),
    on systems from version `on_system`. refused: the accelerator is not used there. source: the report.
    """

    name: str
    trouble: str
    answer: str
    source: str
    accelerators: tuple[str, ...] = ()
    of: str = "torch"
    since: tuple[int, ...] = (0,)
    until: tuple[int, ...] = (10**6,)
    on_system: tuple[int, ...] = (0,)
    architectures: tuple[str, ...] = ()
    refused: bool = False


QUIRKS = (
    Quirk(
        "mps-buffer-limit",
        "Metal refuses buffers of 2**32 bytes, and kernels err beyond 2**31 scores or 2**32 numbers",
        "Sfumato computes attention in smaller chunks and decodes large images in tiles",
        "pytorch#84039, pytorch#149261, pytorch#197636, ComfyUI#14837",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-long-reduction",
        "sums of 32,767 products or more are wrong on M1 and M2",
        "Sfumato splits attention over that many keys, with the same result",
        "pytorch#195163, pytorch#183535",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-batches",
        "of a batch, only the first image may be right",
        "Sfumato generates one image at a time, with the same result; two from torch 2.14 on, if a canary proves them",
        "diffusers#363, pytorch#169342, pytorch#188335",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-half-overflow",
        "stored attention scores overflow in float16 and bfloat16, and images turn black",
        "Sfumato computes stored scores and their softmax in float32",
        "ComfyUI#3521, ComfyUI#4799",
        accelerators=("mps",),
        of="system",
        since=(14, 5),
    ),
    Quirk(
        "mps-sliced-attention",
        "products of empty tensors read NaN (baddbmm with beta=0)",
        "Sfumato's attention slices avoid it",
        "diffusers#11229, pytorch#187521",
        accelerators=("mps",),
        since=(2, 4),
        until=(2, 14),
    ),
    Quirk(
        "mps-fused-attention",
        "fused attention stores all scores in float32: 1.5 times the memory, less than half the speed",
        "Sfumato uses its own chunked attention",
        "pytorch#139389, pytorch#178545",
        accelerators=("mps",),
        since=(2, 5),
        until=(2, 13),
    ),
    Quirk(
        "mps-fused-widths",
        "fused attention covers heads of some widths only, and other ones store all scores",
        "Sfumato pads heads with zeros, and computes wider ones in chunks",
        "pytorch#181575",
        accelerators=("mps",),
        since=(2, 13),
    ),
    Quirk(
        "mps-transposed-matmul",
        "float32 products of transposed views are off by 10 to 30 %",
        "Sfumato copies them first",
        "pytorch#193487",
        accelerators=("mps",),
        since=(2, 7),
        until=(2, 14),
    ),
    Quirk(
        "mps-causal-half",
        "causal attention in half precision sees the tokens that follow",
        "Sfumato passes a mask instead",
        "pytorch#195910",
        accelerators=("mps",),
        since=(2, 10),
    ),
    Quirk(
        "mps-conv-weight-layout",
        "convolution with a weight that is not contiguous is wrong",
        "Sfumato keeps weights contiguous",
        "pytorch#192212, pytorch#193349",
        accelerators=("mps",),
        since=(2, 13),
    ),
    Quirk(
        "mps-compile-layout",
        "compiled networks are changed to channels-last and are up to nine times slower",
        "Sfumato does not compile on Metal; if you do, set TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0",
        "pytorch#192551",
        accelerators=("mps",),
        since=(2, 8),
    ),
    Quirk(
        "mps-macos27",
        "images are garbage on macOS 27 with this torch",
        "pip install --upgrade 'torch>=2.13'",
        "pytorch#187280, InvokeAI#9326",
        accelerators=("mps",),
        until=(2, 13),
        on_system=(27,),
        refused=True,
    ),
    Quirk(
        "mps-intel-amd",
        "the GPUs of Intel Macs compute linear layers wrongly",
        "use the CPU (--device cpu)",
        "InvokeAI#9005, Fooocus#4219",
        accelerators=("mps",),
        architectures=("x86_64",),
        refused=True,
    ),
    Quirk(
        "mps-float64",
        "float64 is not supported",
        "Sfumato computes schedules in float64 on the CPU and applies them in float32",
        "diffusers#1537, diffusers#940",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-priming",
        "the first pass gives different results from later ones",
        "update torch to 2.0 or newer",
        "the guide to Metal Performance Shaders",
        accelerators=("mps",),
        until=(2, 0),
    ),
    Quirk(
        "mps-memory-grows",
        "memory grows with every image, because the allocator never frees it",
        "Sfumato empties its cache between stages",
        "InvokeAI#3404, pytorch#81610, pytorch#152550",
        accelerators=("mps",),
    ),
    Quirk(
        "cpu-float16",
        "float16 is emulated on most CPUs and very slow, and some kernels do not exist",
        "Sfumato uses bfloat16 instead, or float32 if the CPU lacks it",
        "CompVis#307",
        accelerators=("cpu",),
    ),
)


def release(version: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0), text without numbers gives ()."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def known_quirks(
    system_version: str, accelerator: str, torch_version: str, architecture: str = "arm64"
) -> tuple[Quirk, ...]:
    """Return the known issues for these versions on this accelerator."""

    def applies(quirk: Quirk) -> bool:
        number = release(torch_version if quirk.of == "torch" else system_version)
        here = not quirk.accelerators or accelerator in quirk.accelerators
        here = here and (not quirk.architectures or architecture in quirk.architectures)
        return (
            here
            and quirk.since <= number < quirk.until
            and (quirk.on_system == (0,) or release(system_version) >= quirk.on_system)
        )

    return tuple(quirk for quirk in QUIRKS if applies(quirk))
