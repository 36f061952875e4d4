"""How far two results are apart."""

from __future__ import annotations

import torch

# The two libraries add in another order and fuse other operations, so float32 results differ by rounding: some 1e-6 of
# the largest value after one network, and up to ten times that after a loop that feeds results back.
FLOAT32 = 1e-4


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    assert ours.shape == theirs.shape
    scale = theirs.double().abs().max().item()
    assert scale > 0
    return (ours.double() - theirs.double()).abs().max().item() / scale


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator("cpu").manual_seed(seed)
