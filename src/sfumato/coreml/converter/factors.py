"""Constants that float16 cannot represent, split into two factors that it can."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["two_factors"]

# All mantissas of float16: some pair is within 2^-17 of any number, and usually much closer.
CANDIDATES = 1024


def two_factors(value: float, dtype: str) -> tuple[float, float]:
    """Return two values of a dtype whose product is as close as possible to a positive value.

    The second factor is 1 if one is enough, as always in "fp32". The extra multiplication is negligible, and in return
    a program's constants are those of the network. Raises `ValueError` for a value that is not positive.
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
