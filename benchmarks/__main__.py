"""Run the benchmarks: `python -m benchmarks [cpu|memory|startup|schedulers|…]`, all of them if none is named.
`python -m benchmarks cuda`: on an NVIDIA GPU, alone.

Alternated runs, medians, ratios ours / theirs, on full-size Stable Diffusion 1.5 and XL with random weights. Needs an
idle machine. Prints Markdown tables, keeps them in out/benchmarks.json, and writes docs/performance.md from that.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.results import Result, keep, table
from sfumato.bench.cases import Machine
from sfumato.runtime.facts import read_facts

CPU = ("unet", "vae", "picture", "peak", "growth")
XL = ("xl-unet", "xl-peak", "xl-memory")
GROUPS = (*CPU, "draft", "memory", "startup", "schedulers", "coreml", "bulk", "eight-bit", *XL)


def checkpoint(family: str) -> Path:
    """Return a full-size checkpoint with random weights, written on first use; the largest is in half precision."""
    folder = Path("out") / f"benchmark-{family}"
    if not (folder / "model_index.json").is_file():
        sys.path.insert(0, "recipes")
        from random_checkpoint import build

        print(f"writing {folder} (some gigabytes)", file=sys.stderr)
        build(folder, family, torch.bfloat16 if family == "sdxl" else torch.float32)
    return folder


def run(group: str, folder: Path, machine: Machine, runs: int) -> list[Result]:
    """Run one group of benchmarks."""
    from benchmarks import bulk, calls, coreml, draft, eight_bit, growth, pictures, schedulers, startup, xl

    match group:
        case "unet":
            return calls.unet(folder, machine, runs)
        case "vae":
            return calls.vae(folder, machine, runs)
        case "picture":
            return pictures.pictures(folder, machine, runs)
        case "peak":
            return pictures.peak(folder, machine)
        case "growth":
            return growth.growth(folder, machine, runs)
        case "draft":
            return draft.draft(folder, machine, runs)
        case "memory":
            return list(pictures.memory(folder))
        case "coreml":
            return [*coreml.conversion(folder), *coreml.memory(folder), *coreml.execution(folder, runs)]
        case "bulk":
            return bulk.bulk()
        case "eight-bit":
            return eight_bit.eight_bit(folder, machine, runs)
        case "xl-unet":
            return xl.unet(folder, machine, runs)
        case "xl-peak":
            return xl.peak(folder, machine)
        case "xl-memory":
            return list(xl.memory(folder, machine))
        case "startup":
            return startup.startup(folder, runs)
        case _:
            return schedulers.step_overhead(max(runs, 7))


def main() -> None:
    """Run the named groups, store their results and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"any of cpu (that is {', '.join(CPU)}), {', '.join(GROUPS)}")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each, after one to warm up")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--model", type=Path, help="another checkpoint folder; nothing is kept then")
    arguments = parser.parse_args()
    if "cuda" in arguments.groups:
        from benchmarks.cuda import cuda

        sys.exit(cuda())
    for name in arguments.groups:
        if name not in ("cpu", *GROUPS):
            parser.error(f"{name!r} is not one of cpu, {', '.join(GROUPS)}")
    # The reference deprecates a scheduler setting at length; a table is no place for that.
    logging.disable(logging.WARNING)
    groups = [one for name in arguments.groups or GROUPS for one in (CPU if name == "cpu" else [name])]
    machine = Machine.of(read_facts("cpu"), arguments.size)
    for group in groups:
        family = "sdxl" if group in XL else "sd-turbo" if group == "draft" else "sd15"
        folder = arguments.model or (Path() if group == "bulk" else checkpoint(family))
        results = run(group, folder, machine, arguments.runs)
        if arguments.model is None:
            keep(group, results)
        print(f"{table(results)}\n", flush=True)
    if arguments.model is None:
        page.write_page()


if __name__ == "__main__":
    main()
