"""Measures how well two tensors agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decibels"]


def decibels(value: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio of a tensor against a reference, in dB.

    20 log10(max |reference| / root mean square error): infinite if they are equal, minus infinity if either is not
    finite.
    """
    value, reference = value.double(), reference.double()
    if not bool(torch.isfinite(value).all() and torch.isfinite(reference).all()):
        return -math.inf
    error = float((value - reference).square().mean().sqrt())
    peak = float(reference.abs().max())
    return math.inf if error == 0 else 20 * math.log10(max(peak, 1e-30) / error)
