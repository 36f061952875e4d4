"""A training step that begins in plain torch and goes on compiled, once another process has compiled it.

Compiling takes about a minute, which on a rented GPU is dear: `python faster.py NAME` compiles ahead into inductor's
cache while an earlier phase trains. A step that fails to compile, or whose gradients differ, stays as it was.
On a CPU nothing is compiled: with torch 2.13 the compiled decoder's gradients were wrong there (README).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from common import HERE, Log, arguments, set_up_torch
from torch import Tensor, nn

Step = Callable[..., Tensor]
ALIKE = 0.98  # the cosine between both gradients that is asked for
PHASES = {
    "vae": "train_vae",
    "train": "train",
}  # module of each; its `example(row, work, device)` gives model, step, inputs


def compiled(step: Step) -> Step:
    return torch.compile(step, dynamic=False)


def ahead(names: list[str], row: SimpleNamespace, work: Path) -> subprocess.Popen[bytes] | None:
    """Compile the steps of these phases beside this process, one after the other."""
    if not torch.cuda.is_available():
        return None
    with (work / "faster.log").open("ab") as log:
        command = [sys.executable, str(HERE / "faster.py"), *names, "--budget", row.name, "--work", str(work)]
        return subprocess.Popen(command, stdout=log, stderr=log)


class Faster:
    """Calls a step; `look` changes to the compiled one when it is ready."""

    def __init__(self, name: str, model: nn.Module, step: Step, work: Path, log: Log):
        self.name, self.model, self.step, self.log = name, model, step, log
        self.flag = work / f"{name}.compiled"
        self.waiting = torch.cuda.is_available()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of these inputs."""
        return self.step(*inputs)

    def give_up(self) -> None:
        """Stay with plain torch, as after a change of the batch."""
        self.waiting = False

    def look(self, *inputs: Tensor) -> None:
        """Change over if the step was compiled ahead and gives the same gradients for these inputs."""
        if not self.waiting or not self.flag.exists():
            return
        self.waiting = False
        self.step = sped_up(self.name, self.model, self.step, inputs, self.log)


def sped_up(name: str, model: nn.Module, step: Step, inputs: tuple[Tensor, ...], log: Log) -> Step:
    """The step compiled, if it gives the same gradients for these inputs on this GPU; else the step itself."""
    start = time.perf_counter()
    try:
        candidate = compiled(step)
        plain, other = (gradients(model, some, inputs) for some in (step, candidate))
        alike = float(torch.nn.functional.cosine_similarity(plain, other, 0))
        step = candidate if alike > ALIKE else step
        log(f"{name}: compiled, gradients alike {alike:.4f}, {time.perf_counter() - start:.1f} s")
    except Exception as error:  # whatever the compiler does, training goes on
        log(f"{name}: not compiled: {type(error).__name__}: {str(error)[:300]}")
    model.zero_grad(set_to_none=True)
    return step


def gradients(model: nn.Module, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
    model.zero_grad(set_to_none=True)
    step(*inputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    args, row, work = arguments(__doc__, {"names": {"nargs": "+"}})
    device = set_up_torch(row.seed, row.threads)
    for name in args.names:
        start = time.perf_counter()
        try:
            _, step, inputs = importlib.import_module(PHASES[name]).example(row, work, device)
            step = compiled(step)
            for _ in range(2):
                step(*inputs).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            (work / f"{name}.compiled").touch()
            print(f"{name}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
