"""What is measured: cases as data, each run in its own process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.runtime.facts import Facts

__all__ = ["DEFAULTS", "TUNED", "Case", "Machine", "call_cases", "guide_cases", "picture_peers"]

# Set against ours: the reference as its guide's first example has it, and with every setting its guides recommend.
DEFAULTS, TUNED = "its defaults", "its best settings"
BATCH = 8
# 20 steps of the better scheduler do what 50 of the older one did.
BETTER_SCHEDULER, BETTER_SHARE = "dpmpp_2m", 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    library     "sfumato", "diffusers" or "openvino"
    work        "image", or a single call of a network: "unet" (with guidance) or "vae" (decoding)
    tuned       the reference at its best settings instead of its defaults
    scheduler   a short name; the checkpoint's own if None
    size        pixels along each side
    """

    name: str
    library: str = "sfumato"
    work: str = "picture"
    device: str = "cpu"
    dtype: str = "float32"
    tuned: bool = False
    scheduler: str | None = None
    steps: int = 1
    count: int = 1
    size: int = 512


@dataclass(frozen=True)
class Machine:
    """What cases need to know: the device, the fastest half precision that is native there (or float32), the size."""

    device: str
    half: str
    size: int

    @classmethod
    def of(cls, facts: Facts, size: int) -> Machine:
        """From the machine's facts."""
        if facts.accelerator != "cpu":
            return cls(facts.accelerator, "float16", size)
        return cls("cpu", "bfloat16" if facts.native_bfloat16("cpu") else "float32", size)


def guide_cases(machine: Machine, steps: int) -> list[Case]:
    """The guide's path: float32, half precision, a better scheduler with fewer steps, several images.

    Where there is no native half precision, there is no such row, and the others stay in float32.
    """
    plain = Case(name=f"float32, {steps} steps", device=machine.device, steps=steps, size=machine.size)
    half = replace(plain, name=f"{machine.half}, {steps} steps", dtype=machine.half)
    fewer = max(1, round(BETTER_SHARE * steps))
    better = replace(half, name=f"{fewer} steps of {BETTER_SCHEDULER}", scheduler=BETTER_SCHEDULER, steps=fewer)
    several = replace(better, name=f"{BATCH} images of {fewer} steps", count=BATCH)
    return [plain, *([half] if machine.half != "float32" else []), better, several]


def picture_peers(machine: Machine, steps: int) -> list[Case]:
    """The same image by the reference: at its defaults as the first row, at its best as the row of fewer steps."""
    plain, *_, better, _ = guide_cases(machine, steps)
    return [
        replace(plain, name=f"diffusers, {DEFAULTS}", library="diffusers"),
        replace(better, name=f"diffusers, {TUNED}", library="diffusers", tuned=True),
    ]


def call_cases(machine: Machine, work: str, peers: tuple[str, ...]) -> list[Case]:
    """One call of a network by everyone, ours first."""
    ours = Case(name="sfumato", work=work, device=machine.device, dtype=machine.half, size=machine.size)
    cases = [ours]
    if "diffusers" in peers:
        default = replace(ours, name=f"diffusers, {DEFAULTS}", library="diffusers", dtype="float32")
        cases += [default, replace(ours, name=f"diffusers, {TUNED}", library="diffusers", tuned=True)]
    if "openvino" in peers:
        cases.append(replace(ours, name=f"openvino, {machine.half}", library="openvino"))
    return cases
