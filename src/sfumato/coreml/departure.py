"""Finds where two runs diverge: the first operation whose result is wrong, by name."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING, NamedTuple

import torch

from sfumato.coreml.measure import decibels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.coreml.program import Model, Operation
    from sfumato.coreml.runtime import Predictor

__all__ = ["departure"]

# Agreement above this is only float32 rounding, and is ignored.
CEILING = 140.0


class _Computed(NamedTuple):
    """A computed operation: the operation, its index in the function, and its values."""

    operation: Operation
    place: int
    values: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return self.operation.outputs[0].name

    def __str__(self) -> str:
        return f"operation {self.place} {self.operation.type!r} ({self.name})"


def departure(suspect: Predictor, reference: Predictor, probe: Mapping[str, Tensor]) -> str:
    """Return a sentence that names the first operation with a non-finite result or, if none, the largest loss.

    Both models run side by side, each at most one operation ahead of the comparison, and are matched by value name;
    values that only one of them computes are skipped.
    """
    theirs = _computed(reference, probe)
    shared = _names(suspect.model) & _names(reference.model)
    steepest: tuple[float, str] = (0.0, "")
    before = math.inf
    unfit = ""
    for ours in _computed(suspect, probe):
        # Continue both runs to the end in any case, so that their threads finish.
        if unfit or ours.name not in shared:
            continue
        other = next((one for one in theirs if one.name == ours.name), None)
        if other is None:
            continue
        if [value.shape for value in ours.values] != [value.shape for value in other.values]:
            shapes = " and ".join(str(tuple(one.values[0].shape)) for one in (ours, other))
            unfit = f"{ours} differs in shape from the source's ({shapes}), so its checkpoint is of another kind"
            continue
        pairs = list(zip(ours.values, other.values, strict=True))
        # Infinities that the reference has too, such as in masks, are intended.
        if any(bool((~torch.isfinite(a) & torch.isfinite(b)).any()) for a, b in pairs):
            unfit = f"the first non-finite result is that of {ours}"
            continue
        agreement = min(_agreement(a, b) for a, b in pairs)
        lost = min(before, CEILING) - min(agreement, CEILING)
        if lost > steepest[0]:
            steepest = (lost, f"the largest loss is in {ours}: {_db(before)} before it, {_db(agreement)} after")
        before = min(before, agreement)
    for _ in theirs:
        pass
    return unfit or steepest[1] or "no single operation stands out"


def _agreement(value: Tensor, reference: Tensor) -> float:
    """Return the agreement in dB where the reference is finite."""
    meant = torch.isfinite(reference)
    return decibels(value[meant], reference[meant]) if bool(meant.any()) else math.inf


def _names(model: Model) -> set[str]:
    return {output.name for function in model.functions for one in function.operations for output in one.outputs}


def _computed(predictor: Predictor, probe: Mapping[str, Tensor]) -> Iterator[_Computed]:
    """Yield the operations of a run as they are computed, in a thread that is at most one step ahead."""
    ready: Queue[_Computed | BaseException | None] = Queue(maxsize=1)

    def run() -> None:
        try:
            predictor.observe(probe, lambda operation, index, values: ready.put(_Computed(operation, index, values)))
            ready.put(None)
        except BaseException as error:  # raised again in the reader
            ready.put(error)

    threading.Thread(target=run, daemon=True).start()
    while (one := ready.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        yield one


def _db(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.0f} dB"
