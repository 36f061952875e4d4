"""Run the benchmarks: `python -m benchmarks [schedulers|startup|unet|picture …]`.

Alternated runs, medians, ratios ours / reference. Wants a quiet machine; prints a Markdown table for docs/log.md.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from pathlib import Path

import torch

from benchmarks.compare import Comparison, print_table

CHECKPOINT = Path("out") / "benchmark-sd15"
MODES = ("float32", "bfloat16", "bfloat16 channels_last")


def checkpoint() -> Path:
    """Full-size Stable Diffusion 1.5 with random weights, written once."""
    if not (CHECKPOINT / "model_index.json").is_file():
        sys.path.insert(0, "recipes")
        from random_checkpoint import build

        print(f"writing {CHECKPOINT} (4 GB)", file=sys.stderr)
        build(CHECKPOINT, "sd15")
    return CHECKPOINT


def run(what: str, arguments: argparse.Namespace) -> list[Comparison]:
    """One group of benchmarks."""
    from benchmarks import schedulers, startup, unet

    runs = arguments.runs
    match what:
        case "schedulers":
            return schedulers.step_overhead(max(runs, 7))
        case "startup":
            return startup.startup(checkpoint(), runs)
        case "unet":
            return [unet.unet_call(checkpoint(), mode, arguments.size // 8, runs) for mode in arguments.modes]
        case _:
            return [unet.picture(checkpoint(), mode, arguments.size, arguments.steps, runs) for mode in arguments.modes]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    groups = ("schedulers", "startup", "unet", "picture")
    parser.add_argument("what", nargs="*", default=groups, help=f"any of {', '.join(groups)}; all if left out")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each, after one to warm up")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a picture")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    arguments = parser.parse_args()
    for what in arguments.what:
        if what not in groups:
            parser.error(f"{what!r} is not one of {', '.join(groups)}")
    # The reference deprecates a scheduler setting at length; a table is no place for that.
    logging.disable(logging.WARNING)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print_table([result for what in arguments.what for result in run(what, arguments)])


if __name__ == "__main__":
    main()
