"""The time embeddings of a schedule, computed together and projected together: one product per layer for many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.models.blocks import Moment

__all__ = ["Moments"]

# Rows of a product: enough that its cost per step vanishes, few enough that a thousand steps need little memory.
AT_ONCE = 128


class Moments:
    """The moments of the steps that follow each other. Valid as long as the conditioning and the weights are."""

    def __init__(self) -> None:
        self._known: dict[float, Moment] = {}
        self.fixed: Moment | None = None  # instead of any other, while a call is recorded

    def at(
        self,
        unet: Any,
        x: Tensor,
        t: float,
        times: tuple[float, ...],
        with_time: Mapping[str, Tensor],
        condition: Tensor | None,
    ) -> Moment:
        """Return the moment of timestep t for a sample x (B, C, h, w).

        times: the timesteps of the schedule; any other t is computed alone. with_time: the arguments of `unet.moment`
        that are added to the time embedding; condition: its `timestep_cond`.
        """
        if self.fixed is not None:
            return self.fixed
        if t in self._known:
            return self._known[t]
        told = dict(with_time)
        rows = max((one.shape[0] for one in told.values()), default=1)
        rows = rows if condition is None else max(rows, condition.shape[0])
        begin = times.index(t) if t in times else len(times)
        steps = list(dict.fromkeys(times[begin : begin + max(1, AT_ONCE // rows)])) or [t]
        when: Tensor | float = t
        if len(steps) > 1:
            when = torch.tensor(steps, dtype=torch.float32, device=x.device).repeat_interleave(rows)
            told = {name: _repeated(one, rows, len(steps)) for name, one in told.items()}
            condition = None if condition is None else _repeated(condition, rows, len(steps))
        labels = told.pop("class_labels", None)
        every = unet.moment(x, when, labels, condition, told or None).parts(len(steps))
        self._known = dict(zip(steps, every, strict=True))
        return self._known[t]


def _repeated(x: Tensor, rows: int, times: int) -> Tensor:
    """(1 or rows, …) -> (times · rows, …), a copy of all rows for each step."""
    return x.expand(rows, *x.shape[1:]).repeat(times, *(1,) * (x.ndim - 1))
