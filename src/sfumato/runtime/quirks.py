"""Known issues of operating systems and torch versions, and their workarounds."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Quirk", "known_quirks", "release"]


@dataclass(frozen=True)
class Quirk:
    """An issue, where it occurs, and what Sfumato does about it.

    accelerators: empty for all. It affects versions `since` ≤ v < `until` of `of` ("torch" or "system"). source: the
    report.
    """

    name: str
    trouble: str
    answer: str
    source: str
    accelerators: tuple[str, ...] = ()
    of: str = "torch"
    since: tuple[int, ...] = (0,)
    until: tuple[int, ...] = (10**6,)


QUIRKS = (
    Quirk(
        "mps-buffer-limit",
        "Metal refuses buffers of 2**32 bytes, and some kernels more than 2**31 elements",
        "Sfumato computes attention in smaller chunks and decodes large images in tiles",
        "pytorch#84039, pytorch#149261, pytorch#143859",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-batches",
        "batches produce noise or crash",
        "Sfumato generates one image at a time, with the same result",
        "diffusers#1519, diffusers#363, diffusers#941",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-half-overflow",
        "attention scores overflow in float16 and bfloat16, and images turn black",
        "Sfumato computes scores and softmax in float32",
        "ComfyUI#3521, ComfyUI#4799",
        accelerators=("mps",),
        of="system",
        since=(14, 5),
    ),
    Quirk(
        "mps-sliced-attention",
        "attention on non-contiguous slices gives NaN",
        "Sfumato uses contiguous slices with their own memory",
        "diffusers#11229",
        accelerators=("mps",),
        since=(2, 4),
    ),
    Quirk(
        "mps-fused-attention",
        "fused attention stores all scores in float32: 1.5 times the memory, less than half the speed",
        "Sfumato uses its own chunked attention",
        "pytorch#139389, pytorch#178545",
        accelerators=("mps",),
        since=(2, 5),
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
        "InvokeAI#3404, pytorch#81610",
        accelerators=("mps",),
    ),
    Quirk(
        "cpu-float16",
        "float16 is emulated on CPUs and very slow, and some kernels do not exist",
        "Sfumato uses bfloat16 instead, or float32 if the CPU lacks it",
        "CompVis#307",
        accelerators=("cpu",),
    ),
)


def release(version: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0), text without numbers gives ()."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def known_quirks(system_version: str, accelerator: str, torch_version: str) -> tuple[Quirk, ...]:
    """Return the known issues for these versions on this accelerator."""

    def applies(quirk: Quirk) -> bool:
        number = release(torch_version if quirk.of == "torch" else system_version)
        return (not quirk.accelerators or accelerator in quirk.accelerators) and quirk.since <= number < quirk.until

    return tuple(quirk for quirk in QUIRKS if applies(quirk))
