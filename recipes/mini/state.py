"""A training run that can be stopped at any moment: weights, optimiser, averaged weights, step and time in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from common import Clock, load, save
from optim import Average, Optimiser
from torch import Tensor, nn

KEEP_SECONDS = 180


class State:
    """What a checkpoint holds, and when to write one."""

    def __init__(self, path: Path, model: nn.Module, optimiser: Optimiser, decay: float):
        self.path, self.model, self.optimiser = path, model, optimiser
        self.average = Average(model, decay)
        self.step = 0
        self.clock = Clock(path.parent)
        if path.exists():
            self._resume(load(path))
        self.first, self.began = self.step, self.clock.tick()
        self.kept = self.began

    def _resume(self, state: dict) -> None:
        device = next(self.model.parameters()).device
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.weights = {name: value.to(device) for name, value in state["average"].items()}
        self.average.count, self.step, self.clock.spent = state["count"], state["step"], state["spent"]

    def keep(self) -> None:
        """Write the checkpoint, atomically."""
        self.kept = self.clock.tick()
        state = {"model": self.model.state_dict(), "average": self.average.weights, "count": self.average.count}
        rest = {"optimiser": self.optimiser.state_dict(), "step": self.step, "spent": self.clock.spent}
        save(self.path, state | rest)

    def goes_on(self, total: int, minutes: float = 0.0) -> bool:
        """False once the budget is spent, a signal came, or this run had its minutes; waits while paused."""
        if self.step % 10 == 0 and self.clock.paused():
            self.keep()  # a long pause may end in a kill
            self.clock.wait_while_paused()
        if self.clock.tick() - self.kept > KEEP_SECONDS:
            self.keep()
        in_time = not minutes or self.clock.spent - self.began < 60 * minutes
        return self.step < total and in_time and not self.clock.stopped

    def update(self, loss: Tensor, rate: float) -> float:
        """One step of optimiser and average down the loss, which is returned as a number."""
        loss.backward()
        self.optimiser.step(rate)
        self.average.update(self.model)
        self.step += 1
        return float(loss.detach())

    def speed(self, batch: int) -> str:
        """How fast this run goes, and how long all runs took."""
        seconds = max(self.clock.tick() - self.began, 1e-6)
        rate = (self.step - self.first) * batch / seconds
        return f"{rate:.1f}/s, {self.clock.spent / 60:.0f} min in all"


def averaged(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint whose names start with `prefix`, without it."""
    weights = load(path)["average"]
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
