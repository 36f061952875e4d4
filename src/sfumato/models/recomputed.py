"""Gradient checkpointing: layers are recomputed in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Recomputed"]


class Recomputed(nn.Module):
    """A layer that can be recomputed in the backward pass instead of storing its intermediate results."""

    recompute = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the module, with checkpointing if `recompute` is set and gradients are enabled."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *arguments, use_reentrant=False, **named)
        return super().__call__(*arguments, **named)
