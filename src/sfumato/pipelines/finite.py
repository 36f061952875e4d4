"""The check after every stage: non-finite values are recomputed in float32 or reported."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from sfumato.errors import CheckpointError, NonFiniteError
from sfumato.pipelines.repair import computed_in_float32, recall, remember
from sfumato.runtime.device import dtype_name
from sfumato.runtime.numerics import repeat_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sfumato.models.base import Model

__all__ = ["FiniteWatch"]

log = logging.getLogger("sfumato")


class FiniteWatch:
    """Computes the stages of one run and checks their results.

    A stage has a name such as "VAE decoder" or "U-Net, step 7 of 20"; the part before the comma is the component. If a
    component gives NaN or infinity in half precision, it is computed in float32 from there on, and if that helps, in
    later runs too. Notes on this are added to `notes`.
    """

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._pending: list[tuple[str, Model, Tensor]] = []
        self._in_float32: dict[str, bool] = {}
        self._unproven: set[str] = set()

    def finite(self, stage: str, model: Model, compute: Callable[[], Tensor]) -> Tensor:
        """Return a stage's values, which are all finite. Calls `compute` again, in float32, if they are not.

        Raises `CheckpointError` if a weight of the model is not finite, and `NonFiniteError` if float32 is no better.
        """
        values = self._compute(stage, model, compute)
        if bool(_all_finite(values)):
            self._prove(stage, model)
            return values
        self._repair(stage, model)
        return self.finite(stage, model, compute)

    def step(self, stage: str, model: Model, compute: Callable[[], Tensor]) -> Tensor:
        """Return the values of one of many steps. If a check would make the device wait, `settle` checks them later."""
        if self.looks_at_once(model.device):
            return self.finite(stage, model, compute)
        values = self._compute(stage, model, compute)
        self._pending.append((stage, model, _all_finite(values)))
        return values

    @staticmethod
    def looks_at_once(device: torch.device) -> bool:
        """Return whether a check costs no wait: only on a CPU. Other devices compute asynchronously."""
        return device.type == "cpu"

    def settle(self) -> bool:
        """Return whether all steps since the last call were finite. If not, the caller repeats them, in float32.

        Raises the same errors as `finite`.
        """
        pending, self._pending = self._pending, []
        if not pending or bool(torch.stack([flag for *_, flag in pending]).all()):
            for stage, model, _ in pending:
                self._prove(stage, model)
            return True
        stage, model, _ = next(entry for entry in pending if not bool(entry[2]))
        self._repair(stage, model)
        return False

    def _compute(self, stage: str, model: Model, compute: Callable[[], Tensor]) -> Tensor:
        component = _component(stage)
        if component not in self._in_float32:
            self._in_float32[component] = _repeatable(model) and recall(component, model)
            if self._in_float32[component]:
                precision = dtype_name(model.dtype)
                self.note(f"{component}: computed in float32, because {precision} failed with this checkpoint before")
        with computed_in_float32(model) if self._in_float32[component] else nullcontext():
            return compute()

    def _repair(self, stage: str, model: Model) -> None:
        """Switch the component to float32, if that can help."""
        for name, weight in model.state_dict().items():
            if not bool(_all_finite(weight)):
                raise CheckpointError(
                    f"{stage}: the weight {name!r} has NaN or infinite values; download or copy the checkpoint again"
                )
        component = _component(stage)
        if self._in_float32[component] or not _repeatable(model):
            raise NonFiniteError(stage, model.remedy)
        self.note(f"{stage}: {dtype_name(model.dtype)} gave NaN or infinity, so it was computed again in float32")
        self._in_float32[component] = True
        self._unproven.add(component)

    def _prove(self, stage: str, model: Model) -> None:
        component = _component(stage)
        if component in self._unproven:
            self._unproven.remove(component)
            remember(component, model)

    def note(self, note: str) -> None:
        """Add a note to the run's, and log it."""
        self._notes.append(note)
        log.warning("%s", note)


def _all_finite(values: Tensor) -> Tensor:
    return torch.isfinite(values).all()


def _component(stage: str) -> str:
    return stage.partition(",")[0]


def _repeatable(model: Model) -> bool:
    return repeat_dtype(model.device.type, dtype_name(model.dtype)) is not None
