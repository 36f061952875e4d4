"""The optimiser of every training step: Muon for weight matrices, AdamW for the rest, and averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

ROUNDS = 5  # of each precision, when the faster one is looked for


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrix by a quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon")."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates; convolutions count as (out, in * height * width) matrices."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                velocity = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalise(weight.grad.add(velocity, alpha=group["momentum"]).flatten(1))
                # The usual 0.2 * sqrt(longer side): the update's root mean square then matches AdamW's.
                scale = 0.2 * math.sqrt(max(update.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


class Optimiser:
    """Both optimisers behind one `step(lr)`; `lr` means AdamW's scale for both."""

    def __init__(self, model: nn.Module, muon: bool, weight_decay: float = 0.01):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            outer = any(part in name for part in ("embedding.", "conv_in", "conv_out", "head."))
            (matrices if muon and parameter.ndim >= 2 and not outer else others).append(parameter)
        fused = {"fused": True}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay, **fused)
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr=1.0, weight_decay=weight_decay))
        self.parameters = [*matrices, *others]

    def step(self, lr: float, clip: float = 1.0) -> float:
        """Clip, update, clear; returns the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict]:
        """State of both parts, for a checkpoint."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Resume from `state_dict`."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a model's weights, with a ramp so that early noise is forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.count = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's present weights."""
        self.count += 1
        keep = min(self.decay, (self.count + 1) / (self.count + 20))
        state = model.state_dict()
        for name, value in self.weights.items():
            if value.is_floating_point():
                value.lerp_(state[name], 1 - keep)
            else:
                value.copy_(state[name])


def learning_rate(peak: float, done: float, warmup: float, cooldown: float) -> float:
    """Warm up, hold, then fall linearly to 0 over the last `cooldown` of the budget; `done` runs from 0 to 1."""
    if done < warmup:
        return peak * max(done / warmup, 0.01)
    if done > 1 - cooldown:
        return peak * max((1 - done) / cooldown, 0.0)
    return peak


def faster_precision(device: torch.device, step: Callable[[], None]) -> torch.dtype | None:
    """bfloat16 autocast where `step` runs faster in it, else None; measured, because many CPUs only emulate it.

    Both take turns and their best rounds count, so that other work on the machine decides nothing.
    """
    seconds: dict[torch.dtype | None, list[float]] = {None: [], torch.bfloat16: []}
    for _ in range(1 + ROUNDS):
        for dtype, rounds in seconds.items():
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype or torch.float32, enabled=dtype is not None):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds.append(time.perf_counter() - start)
    # The first round warms up.
    best = {dtype: min(rounds[1:]) for dtype, rounds in seconds.items()}
    return torch.bfloat16 if best[torch.bfloat16] < 0.9 * best[None] else None
