"""Constants that float16 cannot represent, split into two factors that it can."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["two_factors"]

# All mantissas of float16: some pair comes within 2^-17 of any number, and mostly much nearer.
CANDIDATES = 1024


def two_factors(value: float, dtype: str) -> tuple[float, float]:
    """Two numbers of a type whose product is as near as can be to a positive value; the second is 1 where one suffices.

    In "fp32" one always does. Multiplying twice costs nothing beside what surrounds it, and a program's constants then
    are the network's own. Raises `ValueError` for a value that is not positive.
    """
    if value <= 0:
        raise ValueError(f"only positive numbers can be factorized, not {value}")
    if dtype != "fp16" or float(np.float16(value)) == value:
        return value, 1.0
    root = math.sqrt(value)
    step = float(np.spacing(np.float16(root)))
    first = (root + step * np.arange(CANDIDATES)).astype(np.float16).astype(np.float64)
    second = (value / first).astype(np.float16).astype(np.float64)
    best = int(np.argmin(np.abs(first * second - value)))
    return float(first[best]), float(second[best])
