"""A training run that can be stopped at any moment: weights, optimiser, averaged weights, step and time in one file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from common import Clock, load, save
from optim import Average, Optimiser
from torch import Tensor, nn

KEEP_SECONDS = 60
PUBLISHED = ("train", "judge")  # the autoencoder is published once its latents are folded
PART_BYTES = 12_000_000  # of a published file, at most


class State:
    """What a checkpoint holds, when to write one, and how much of its budget a run has used.

    The budget is a number of steps, or of seconds where those are given: rates and the end then follow the clock.
    """

    def __init__(
        self, path: Path, model: nn.Module, optimiser: Optimiser, decay: float, *, steps: int = 0, seconds: float = 0.0
    ):
        self.path, self.model, self.optimiser = path, model, optimiser
        self.average = Average(model, decay)
        self.step, self.steps, self.seconds = 0, max(steps, 1), seconds
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
        if self.path.stem in PUBLISHED:
            publish(self.path.stem, self.average.weights)
        save(self.path, state | rest)

    @property
    def done(self) -> float:
        """The share of the budget that is used, 0 to 1 and a little more."""
        return self.clock.tick() / self.seconds if self.seconds else self.step / self.steps

    def goes_on(self, minutes: float = 0.0) -> bool:
        """False once the budget is spent, a signal came, or this run had its minutes; waits while paused."""
        if self.step % 10 == 0 and self.clock.paused():
            self.keep()  # a long pause may end in a kill
            self.clock.wait_while_paused()
        if self.clock.tick() - self.kept > KEEP_SECONDS:
            self.keep()
        in_time = not minutes or self.clock.spent - self.began < 60 * minutes
        return self.done < 1 and in_time and not self.clock.stopped

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of optimiser and average down the loss."""
        loss.backward()
        self.optimiser.step(rate)
        self.average.update(self.model)
        self.step += 1

    def run(
        self,
        name: str,
        loss_at: Callable[[int], Tensor],
        rate_at: Callable[[float], float],
        log: Callable[[str], None],
        *,
        every: int,
        batch: int,
        minutes: float,
    ) -> None:
        """Train until the budget is spent, and keep the result. loss_at: of a step; rate_at: of the share done."""
        while self.goes_on(minutes):
            loss = loss_at(self.step)
            self.update(loss, rate_at(self.done))
            if self.step % every == 0:
                log(f"{name}: loss {float(loss.detach()):.4f}, {self.speed(batch)}")
        self.keep()

    def fall_back(self) -> None:
        """Go back to the averaged weights and forget the momentum: what to do when a loss is not a number."""
        self.model.load_state_dict(self.average.weights)
        for part in self.optimiser.parts:
            part.state.clear()

    def speed(self, batch: int) -> str:
        """How far and how fast this run goes."""
        seconds = max(self.clock.tick() - self.began, 1e-6)
        rate = (self.step - self.first) * batch / seconds
        return f"step {self.step}, {self.done:.0%}, {rate:.1f}/s, {self.clock.spent / 60:.1f} min in all"


def publish(name: str, weights: dict[str, Tensor]) -> None:
    """Copy weights in fp16 to the folder that the environment's PUBLISH names, in files of at most PART_BYTES."""
    folder = os.environ.get("PUBLISH", "")
    if not folder:
        return
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in weights.items():
        half = value.half().cpu() if value.is_floating_point() else value.cpu()
        if size + half.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = half
        size += half.nbytes
    for number, part in enumerate(parts):
        save(Path(folder) / f"{name}.{number}.pt", part)


def averaged(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint whose names start with `prefix`, without it."""
    weights = load(path)["average"]
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
