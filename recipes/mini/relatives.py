"""The relatives that are trained on a GPU, beside each other and by the clock: each step is a process of its own.

Scenes first, then `lora`, `lcm`, `control`, `inpaint` and `judge` at once, which end `--deadline` seconds from the
start less EXAMINED, then their evaluation. What is done so far lies in the folder that the environment's PUBLISH names.
`--check` runs everything for a moment.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import scenes
from common import HERE, Log, arguments

STEPS = ("inpaint", "control", "lcm", "judge", "lora")
EXAMINE = "evaluate_relatives"
EXAMINED = 55.0  # seconds kept for the evaluation
MOMENT = 3.0
MEASURE_FAILED = 3  # the status where all is trained


def small(row: SimpleNamespace) -> None:
    """Every step for a moment, at full size."""
    row.scene_parts, row.scene_part, row.painted, row.compiled = 16, 400, 3, False
    row.judged_pairs, row.judged_scenes, row.sheet_prompts, row.log_every = 16, 16, 8, 2
    for name in STEPS:
        setattr(row, f"{name}_seconds", MOMENT)


def one(name: str, row: SimpleNamespace, work: Path) -> None:
    """Train one relative, or the judge, in this process."""
    log = Log(work / f"{name}.log")
    module = importlib.import_module(name)
    if name == EXAMINE:
        module.run(row, work, log)
    elif name == "judge":
        module.train(row, work, log)
    else:
        module.train(row, work, log, 0.0)
    import torch

    if torch.cuda.is_available():
        log(f"{name}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


def beside(names: tuple[str, ...], options: list[str], work: Path, log: Log) -> list[str]:
    """Run these steps at once; returns those that failed."""
    command = [sys.executable, str(HERE / "relatives.py"), *options, "--work", str(work), "--only"]
    running = {name: subprocess.Popen([*command, name]) for name in names}
    failed = []
    while running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                failed += [name] if process.returncode else []
                log(f"relatives: {name} {'failed' if process.returncode else 'done'}")
                share(work)
        time.sleep(0.2)
    return failed


def share(work: Path) -> None:
    """Copy what is there to where it is published."""
    folder = os.environ.get("PUBLISH", "")
    if folder:
        made = [
            *(work / "relatives").glob("*"),
            *(work / "sheets").glob("*"),
            *work.glob("*.log"),
            *work.glob("*.json"),
        ]
        subprocess.run(["cp", "-rpu", *map(str, made), folder], check=True)


def main() -> None:
    began = time.time()
    options: dict = {"--deadline": {"type": float, "default": 400.0, "help": "seconds from the start"}}
    options["--check"] = {"action": "store_true", "help": "everything for a moment"}
    options["--only"] = {"default": "", "help": "one step, in this process"}
    options["--until"] = {"type": float, "default": 0.0, "help": "when training ends, as time.time counts"}
    args, row, work = arguments(__doc__, options)
    if args.check:
        small(row)
    if args.only:
        row.until = args.until
        one(args.only, row, work)
        return
    log = Log(work / "relatives.log")
    scenes.run(row, work, max(2, (os.cpu_count() or 2) - 1))
    log(f"relatives: scenes at {time.time() - began:.0f} s")
    until = 0.0 if args.check else began + args.deadline - EXAMINED
    how = ["--budget", row.name, "--until", str(until), *(["--check"] if args.check else [])]
    failed = beside(STEPS, how, work, log)
    log(f"relatives: trained at {time.time() - began:.0f} s")
    unmeasured = beside((EXAMINE,), how, work, log)
    log(f"relatives: all at {time.time() - began:.0f} s")
    share(work)
    if failed or unmeasured:
        print(f"mini: these failed: {', '.join(failed + unmeasured)}.", file=sys.stderr)
        sys.exit(1 if failed else MEASURE_FAILED)


if __name__ == "__main__":
    main()
