"""All training in one process, for a machine that is rented by the minute: art, scenes and latents stay on it.

Every phase is a step of its own too, and resumes; a phase that is done is left out. With `--deadline`, the U-Net trains
for what is left of so many seconds from the start, and the later phases only while that is not over. The environment's
PUBLISH names a folder for the weights so far.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import encode
import faster
import judge
import scenes
import sharpen
import torch
import train
import train_text
import train_vae
from common import Log, arguments, load, save, set_up_torch
from compose import Sprites
from torch import Tensor

TAIL = 12.0  # seconds kept for the last sheet and checkpoint of the U-Net


def bank_of(row: SimpleNamespace, work: Path, log: Log, sprites: Sprites) -> dict[str, Tensor]:
    """The encoded scenes, made or read; they are written beside what follows."""
    if (work / "bank.pt").exists():
        return load(work / "bank.pt")
    bank = encode.run(row, work, log, sprites)
    copy = {name: value.cpu() for name, value in bank.items()}
    threading.Thread(target=save, args=(work / "bank.pt", copy)).start()
    return bank


def run(row: SimpleNamespace, work: Path, log: Log, began: float, deadline: float) -> None:
    def left() -> float:
        return deadline - (time.monotonic() - began) if deadline else float("inf")

    scenes.run(row, work, max(2, (os.cpu_count() or 2) - 1))
    log(f"together: scenes at {time.monotonic() - began:.0f} s")
    device = set_up_torch(row.seed, row.threads)
    sprites = Sprites.of(work, device)
    log(f"together: art on {device} at {time.monotonic() - began:.0f} s")
    if not (work / "vae_final.pt").exists():
        train_vae.train(row, work, log, sprites)
    bank = bank_of(row, work, log, sprites)
    if not (work / "train.pt").exists():
        train_text.train(row, work, log, bank)
    if not (work / "train.done").exists():
        row.seconds = min(row.seconds, left() - TAIL) if row.seconds else row.seconds
        train.train(row, work, log, bank)
        (work / "train.done").touch()
        show(work)
    log(f"together: U-Net done at {time.monotonic() - began:.0f} s")
    phases = {
        "sharpen": (lambda: sharpen.train(row, work, log, sprites), row.sharpen_seconds),
        "judge": (lambda: judge.train(row, work, log, sprites), row.judge_seconds),
    }
    for name, (phase, seconds) in phases.items():
        if left() > seconds + TAIL and not (work / f"{name}.done").exists():
            try:
                phase()
            except Exception:  # what follows the model itself may fail alone
                log(f"together: {name} failed\n{traceback.format_exc()}")
                continue
            (work / f"{name}.done").touch()
            show(work)
            log(f"together: {name} done at {time.monotonic() - began:.0f} s")


def show(work: Path) -> None:
    """Copy the newest sheet to where the weights are published."""
    sheets = sorted((work / "sheets").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if sheets and os.environ.get("PUBLISH"):
        shutil.copy(sheets[-1], Path(os.environ["PUBLISH"]) / "sheet.png")


def small(row: SimpleNamespace) -> None:
    """Every phase for a moment, at full size: does this machine do it at all?"""
    row.scene_parts, row.scene_part = 4, 384
    for name in ("vae_seconds", "text_seconds", "seconds", "judge_seconds", "sharpen_seconds"):
        setattr(row, name, 1.5)
    row.log_every = 2
    row.sheet_prompts = 4


def main() -> None:
    began = time.monotonic()
    options: dict = {"--deadline": {"type": float, "default": 0.0, "help": "seconds from the start"}}
    options["--check"] = {"action": "store_true", "help": "every phase for a moment"}
    args, row, work = arguments(__doc__, options)
    if args.check:
        small(row)
    elif not (work / "train.done").exists() and not (work / "faster.log").exists():
        faster.ahead(["vae", "train"], row, work)
    run(row, work, Log(work / "together.log"), began, args.deadline)
    if torch.cuda.is_available():
        print(f"together: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


if __name__ == "__main__":
    main()
