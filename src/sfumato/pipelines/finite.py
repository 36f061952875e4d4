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
    """Has the stages of one run computed, and looks at what comes out.

    A stage is named "VAE decoder" or "U-Net, step 7 of 20"; what stands before the comma is the component. One that
    gives NaN or infinite values in half precision computes in float32 from there on, and so it does in later runs if
    that helped. `notes` are told.
    """

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._pending: list[tuple[str, Model, Tensor]] = []
        self._in_float32: dict[str, bool] = {}
        self._unproven: set[str] = set()

    def finite(self, stage: str, model: Model, compute: Callable[[], Tensor]) -> Tensor:
        """The stage's values, all finite; `compute` is called a second time if the first ones are not.

        Raises `CheckpointError` if a weight of the model is not finite, and `NonFiniteError` if float32 is no better.
        """
        values = self._compute(stage, model, compute)
        if bool(_all_finite(values)):
            self._prove(stage, model)
            return values
        self._repair(stage, model)
        return self.finite(stage, model, compute)

    def step(self, stage: str, model: Model, compute: Callable[[], Tensor]) -> Tensor:
        """The values of one of many steps: as `finite`, but where looking makes the device wait, `settle` looks."""
        if self.looks_at_once(model.device):
            return self.finite(stage, model, compute)
        values = self._compute(stage, model, compute)
        self._pending.append((stage, model, _all_finite(values)))
        return values

    @staticmethod
    def looks_at_once(device: torch.device) -> bool:
        """Whether a flag is there as soon as it is asked for: on a CPU. Others compute while the next step is sent."""
        return device.type == "cpu"

    def settle(self) -> bool:
        """Whether all steps since the last call were finite; if not, they are to be taken again, then in float32.

        Raises as `finite` does.
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
                self._note(f"{component}: computed in float32, because {precision} failed with this checkpoint before")
        with computed_in_float32(model) if self._in_float32[component] else nullcontext():
            return compute()

    def _repair(self, stage: str, model: Model) -> None:
        """From here on float32, if there is hope in that."""
        for name, weight in model.state_dict().items():
            if not bool(_all_finite(weight)):
                raise CheckpointError(
                    f"{stage}: the weight {name!r} has NaN or infinite values; download or copy the checkpoint again"
                )
        component = _component(stage)
        if self._in_float32[component] or not _repeatable(model):
            raise NonFiniteError(stage, model.remedy)
        self._note(f"{stage}: {dtype_name(model.dtype)} gave NaN or infinity, so it was computed again in float32")
        self._in_float32[component] = True
        self._unproven.add(component)

    def _prove(self, stage: str, model: Model) -> None:
        component = _component(stage)
        if component in self._unproven:
            self._unproven.remove(component)
            remember(component, model)

    def _note(self, note: str) -> None:
        self._notes.append(note)
        log.warning("%s", note)


def _all_finite(values: Tensor) -> Tensor:
    return torch.isfinite(values).all()


def _component(stage: str) -> str:
    return stage.partition(",")[0]


def _repeatable(model: Model) -> bool:
    return repeat_dtype(model.device.type, dtype_name(model.dtype)) is not None
