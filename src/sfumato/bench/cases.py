"""What is measured: cases as data, each run in its own process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.runtime.facts import Facts

__all__ = ["DEFAULTS", "TUNED", "Case", "Machine", "call_cases", "guide_cases", "picture_peers"]

# The reference as in its guide's first example, and with every setting that its guides recommend.
DEFAULTS, TUNED = "its defaults", "its best settings"
BATCH = 8
# 20 steps of the better scheduler match 50 of the older one.
BETTER_SCHEDULER, BETTER_SHARE = "dpmpp_2m", 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    library     "sfumato", "diffusers" or "openvino"
    work        "picture" (a whole image), or one network call: "unet" (with guidance) or "vae" (decoding)
    tuned       the reference at its best settings instead of its defaults
    scheduler   a short name; None for the checkpoint's own
    size        pixels per side
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
    """The facts that cases depend on: device, fastest native half precision ("float32" if none) and image size."""

    device: str
    half: str
    size: int

    @classmethod
    def of(cls, facts: Facts, size: int) -> Machine:
        """Create a `Machine` from the facts about this computer."""
        if facts.accelerator != "cpu":
            return cls(facts.accelerator, "float16", size)
        return cls("cpu", "bfloat16" if facts.native_bfloat16("cpu") else "float32", size)


def guide_cases(machine: Machine, steps: int) -> list[Case]:
    """Return the steps of the guide: float32, half precision, a better scheduler with fewer steps, several images.

    Without native half precision, that row is omitted and the others stay in float32.
    """
    plain = Case(name=f"float32, {steps} steps", device=machine.device, steps=steps, size=machine.size)
    half = replace(plain, name=f"{machine.half}, {steps} steps", dtype=machine.half)
    fewer = max(1, round(BETTER_SHARE * steps))
    better = replace(half, name=f"{fewer} steps of {BETTER_SCHEDULER}", scheduler=BETTER_SCHEDULER, steps=fewer)
    several = replace(better, name=f"{BATCH} images of {fewer} steps", count=BATCH)
    return [plain, *([half] if machine.half != "float32" else []), better, several]


def picture_peers(machine: Machine, steps: int) -> list[Case]:
    """Return the same image by the reference: its defaults match the first row, its best settings the shorter run."""
    plain, *_, better, _ = guide_cases(machine, steps)
    return [
        replace(plain, name=f"diffusers, {DEFAULTS}", library="diffusers"),
        replace(better, name=f"diffusers, {TUNED}", library="diffusers", tuned=True),
    ]


def call_cases(machine: Machine, work: str, peers: tuple[str, ...]) -> list[Case]:
    """Return one network call per library, Sfumato's first."""
    ours = Case(name="sfumato", work=work, device=machine.device, dtype=machine.half, size=machine.size)
    cases = [ours]
    if "diffusers" in peers:
        default = replace(ours, name=f"diffusers, {DEFAULTS}", library="diffusers", dtype="float32")
        cases += [default, replace(ours, name=f"diffusers, {TUNED}", library="diffusers", tuned=True)]
    if "openvino" in peers:
        cases.append(replace(ours, name=f"openvino, {machine.half}", library="openvino"))
    return cases
