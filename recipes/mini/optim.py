"""The optimiser of every training step: Muon for weight matrices, AdamW for the rest, and averaged weights."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

ROUNDS = 5  # of each precision, when the faster one is looked for


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal of each matrix (N, a, b) by a quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    if x.is_cuda:
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates; convolutions count as (out, in * height * width) matrices.

    Matrices of one shape are taken together, which spares a GPU thousands of small launches.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault((weight.shape[0], weight[0].numel()), []).append(weight)
                    if not self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
            for shape, weights in shapes.items():
                grads = [weight.grad for weight in weights]
                velocity = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_mul_(velocity, group["momentum"])
                torch._foreach_add_(velocity, grads)
                torch._foreach_add_(grads, velocity, alpha=group["momentum"])
                update = orthogonalise(torch.stack([grad.reshape(shape) for grad in grads]))
                # The usual 0.2 * sqrt(longer side): the update's root mean square then matches AdamW's.
                scale = 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                steps = [some.view_as(weight) for some, weight in zip(update, weights, strict=True)]
                torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)


class Optimiser:
    """Both optimisers behind one `step(lr)`; `lr` means AdamW's scale for both."""

    def __init__(self, model: nn.Module, muon: bool, weight_decay: float = 0.01):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            outer = any(part in name for part in ("embedding.", "conv_in", "conv_out", "head."))
            (matrices if muon and parameter.ndim >= 2 and not outer else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr=1.0, weight_decay=weight_decay))
        self.parameters = [*matrices, *others]

    def step(self, lr: float, clip: float = 1.0) -> None:
        """Clip, update, clear. Waits for nothing: the device goes on by itself."""
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

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
        names = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.weights[name] for name in names], [state[name] for name in names], 1 - keep)


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


@functools.cache
def precision(device: torch.device) -> torch.dtype | None:
    """What to autocast to on this device: bfloat16, or None for float32 on a CPU that is slower in it."""
    if device.type == "cuda":
        return torch.bfloat16
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(8, 64, 32, 32)
    with torch.enable_grad():
        return faster_precision(device, lambda: layer(x).sum().backward())
