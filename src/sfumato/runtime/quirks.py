"""Known troubles of operating systems and versions of torch, and what is done about each."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Quirk", "known_quirks", "release"]


@dataclass(frozen=True)
class Quirk:
    """A trouble, where it is found, and what Sfumato does about it.

    accelerators empty: all; versions from `since` up to, but without, `until`, of `of` ("torch" or
    "system"); source names the report.
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
        "attention is cut into chunks below both, large pictures are decoded in tiles",
        "pytorch#84039, pytorch#149261, pytorch#143859",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-batches",
        "batches come out as noise or crash",
        "pictures are drawn one at a time, with the same result",
        "diffusers#1519, diffusers#363, diffusers#941",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-half-overflow",
        "the scores of attention overflow in float16 and bfloat16, and pictures turn black",
        "scores and softmax are computed in float32",
        "ComfyUI#3521, ComfyUI#4799",
        accelerators=("mps",),
        of="system",
        since=(14, 5),
    ),
    Quirk(
        "mps-sliced-attention",
        "attention over slices that are not contiguous gives NaN",
        "slices are contiguous and written into memory of their own",
        "diffusers#11229",
        accelerators=("mps",),
        since=(2, 4),
    ),
    Quirk(
        "mps-fused-attention",
        "fused attention holds all scores in float32: half as much memory again, and less than half the speed",
        "attention is our own, in chunks",
        "pytorch#139389, pytorch#178545",
        accelerators=("mps",),
        since=(2, 5),
    ),
    Quirk(
        "mps-float64",
        "there is no float64",
        "schedules are computed in float64 on the CPU and applied as float32 numbers",
        "diffusers#1537, diffusers#940",
        accelerators=("mps",),
    ),
    Quirk(
        "mps-priming",
        "the first pass differs from later ones",
        "update torch to 2.0 or newer",
        "the ecosystem's guide to Metal Performance Shaders",
        accelerators=("mps",),
        until=(2, 0),
    ),
    Quirk(
        "mps-memory-grows",
        "memory grows with every picture, as the allocator keeps what it once had",
        "its cache is emptied between the stages",
        "InvokeAI#3404, pytorch#81610",
        accelerators=("mps",),
    ),
    Quirk(
        "cpu-float16",
        "float16 is emulated, many times slower than bfloat16 or float32, or some kernel is not there at all",
        "float16 becomes bfloat16 where the processor has it, else float32",
        "CompVis#307",
        accelerators=("cpu",),
    ),
)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0); nothing for a text without numbers."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def known_quirks(system_version: str, accelerator: str, torch_version: str) -> tuple[Quirk, ...]:
    """The quirks that a machine has, from its versions."""

    def applies(quirk: Quirk) -> bool:
        number = release(torch_version if quirk.of == "torch" else system_version)
        return (not quirk.accelerators or accelerator in quirk.accelerators) and quirk.since <= number < quirk.until

    return tuple(quirk for quirk in QUIRKS if applies(quirk))
