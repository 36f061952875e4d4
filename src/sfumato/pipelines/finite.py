"""The check that ends every stage: no NaN, no infinity, and the stage's name where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sfumato.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """Collects one flag per stage and judges them without making an accelerator wait between steps.

    On a CPU a flag is there at once, so a bad stage stops the work immediately; elsewhere the flags are read together,
    at the end of the loop.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[str, nn.Module, Tensor]] = []

    def see(self, stage: str, module: nn.Module, values: Tensor) -> None:
        """Note whether all values of this stage, computed by this module, are finite."""
        self._pending.append((stage, module, torch.isfinite(values).all()))
        if values.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Raise for the first stage that went wrong: `CheckpointError` if its weights did, else `NonFiniteError`."""
        pending, self._pending = self._pending, []
        if not pending or bool(torch.stack([flag for *_, flag in pending]).all()):
            return
        stage, module, _ = next(entry for entry in pending if not bool(entry[2]))
        for name, weight in module.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise CheckpointError(
                    f"{stage}: the weight {name!r} has NaN or infinite values; download or copy the checkpoint again"
                )
        dtype = next(module.parameters()).dtype
        hint = (
            "try dtype float32"
            if dtype != torch.float32
            else "check the prompt embeddings, latents or image that were given"
        )
        raise NonFiniteError(stage, hint)
