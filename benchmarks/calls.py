"""Single calls of the U-Net and of the VAE's decoder, alternated between the libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.results import Result
from sfumato.bench import openvino, ours, reference
from sfumato.bench.cases import Case, Machine
from sfumato.bench.timing import alternate, timed
from sfumato.bench.worker import Job, measure

__all__ = ["unet", "vae"]

CONVERTED = Path("out") / "openvino"


def unet(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Compare a U-Net call with every other library, in half precision and in float32."""
    plain = Case(name="", work="unet", device=machine.device, size=machine.size)
    half = replace(plain, dtype=machine.half)
    default = timed(reference.call(plain, folder))
    calls = {
        "ours": timed(ours.call(half, folder)),
        "best": timed(reference.call(replace(half, tuned=True), folder)),
        "openvino": timed(_openvino(half, folder)),
        "default": default,
    }
    times = alternate(calls, runs)
    calls.clear()  # two networks in float32 want the room
    wide = alternate({"ours": timed(ours.call(plain, folder)), "default": default}, runs)
    name = f"U-Net call, {machine.size}², {machine.half}"
    return [
        Result.of_times(f"{name} (openvino, {machine.half})", times["ours"], times["openvino"], 0.95),
        Result.of_times(f"{name} (diffusers at its best)", times["ours"], times["best"], 0.55),
        Result.of_times(f"{name} (diffusers' defaults, float32)", times["ours"], times["default"], 0.25),
        Result.of_times(
            f"U-Net call, {machine.size}², float32 (diffusers, float32)", wide["ours"], wide["default"], 0.65
        ),
    ]


def vae(folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Compare decoding one image. Each library runs in its own process, because reused memory affects speed."""
    plain = Case(name="", work="vae", device=machine.device, size=machine.size)
    half = replace(plain, dtype=machine.half)
    cases = {
        "ours": half,
        "best": replace(half, library="diffusers", tuned=True),
        "openvino": replace(half, library="openvino"),
        "default": replace(plain, library="diffusers"),
    }

    def seconds(case: Case) -> Callable[[], float]:
        return lambda: measure(Job(case, str(folder), None, str(CONVERTED / folder.name))).seconds

    times = alternate({name: seconds(replace(case, name=name)) for name, case in cases.items()}, runs)
    name = f"VAE decoding, {machine.size}², {machine.half}"
    return [
        Result.of_times(f"{name} (diffusers at its best)", times["ours"], times["best"], 0.75),
        Result.of_times(f"{name} (openvino, {machine.half})", times["ours"], times["openvino"]),
        Result.of_times(f"{name} (diffusers' defaults, float32)", times["ours"], times["default"]),
    ]


def _openvino(case: Case, folder: Path) -> Callable[[], object]:
    """Return a call of the converted network. Another process converts it, because that leaves gigabytes behind."""
    converted = CONVERTED / folder.name
    if not (converted / f"{case.work}-{case.size}.xml").is_file():
        measure(Job(replace(case, name="openvino", library="openvino"), str(folder), None, str(converted)))
    return openvino.call(case, folder, converted)
