"""Deterministic one-dimensional k-means for weight palettes.

In one dimension, clusters are intervals, so dynamic programming finds the optimal k clusters without random starts
(Wang and Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011). Half-precision weights have at most 63,488 different values,
so everything is computed on distinct values and their counts, regardless of the number of weights.
"""

from __future__ import annotations

import numpy as np

__all__ = ["cluster"]

# If there are more values than this, or than this many per cluster, they are grouped first, and clusters consist of
# groups; Lloyd's iterations then correct the borders. If every value is a separate group, the result is exact.
GROUPS = 1024
GROUPS_OF_A_CLUSTER = 16

# Most iterations of Lloyd's algorithm after the dynamic program; most tensors need fewer than ten.
STEPS = 100


def cluster(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Return at most k centres, ascending, that minimize the sum of `counts` times squared distance to the nearest one.

    values: float64, ascending, finite, not empty; counts: float64, positive, one per value. With up to `GROUPS` values
    the centres are optimal; with more, they are a local optimum, found by starting from the optimum of the groups.
    """
    if len(values) <= k:
        return values.copy()
    middle = (values @ counts) / counts.sum()
    sums = _Sums(values - middle, counts)
    edges = _groups(values, counts, max(GROUPS, GROUPS_OF_A_CLUSTER * k))
    borders = edges[_best_borders(sums.at(edges), k)]
    for _ in range(STEPS):
        centres = sums.means(borders)
        moved = np.searchsorted(values - middle, (centres[:-1] + centres[1:]) / 2)
        new = np.unique(np.concatenate([[0], moved, [len(values)]]))
        if np.array_equal(new, borders):
            break
        borders = new
    return sums.means(borders) + middle


class _Sums:
    """Prefix sums of counts, values and squares, which give those of any interval."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        zero = np.zeros(1)
        self.count = np.concatenate([zero, np.cumsum(counts)])
        self.sum = np.concatenate([zero, np.cumsum(counts * values)])
        self.square = np.concatenate([zero, np.cumsum(counts * values * values)])

    def at(self, edges: np.ndarray) -> _Sums:
        """Return the prefix sums at some of the edges."""
        sums = object.__new__(_Sums)
        sums.count, sums.sum, sums.square = self.count[edges], self.sum[edges], self.square[edges]
        return sums

    def means(self, borders: np.ndarray) -> np.ndarray:
        """Return the mean of each interval between adjacent borders."""
        return np.diff(self.sum[borders]) / np.diff(self.count[borders])

    def error(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return the sum of squared distances from the mean in each (non-empty) interval."""
        total = self.sum[end] - self.sum[begin]
        return self.square[end] - self.square[begin] - total * total / (self.count[end] - self.count[begin])


def _groups(values: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Return the edges of about `most` groups at most, as dense as good centres are: with the cube root of the density.

    Source: Bennett, "Spectra of quantized signals", 1948. Half of the edges are evenly spaced by rank, so that rare
    outliers are distinguished, too.
    """
    size = len(values)
    if size <= most:
        return np.arange(size + 1)
    widths = np.gradient(values) + np.finfo(np.float64).tiny
    wanted = np.cumsum(counts ** (1 / 3) * widths ** (2 / 3))
    dense = np.searchsorted(wanted, np.linspace(0, wanted[-1], most // 2))
    even = np.linspace(0, size, most // 2).astype(np.int64)
    return np.unique(np.concatenate([[0], dense, even, [size]]))


def _best_borders(sums: _Sums, k: int) -> np.ndarray:
    """Split the groups into k intervals of least error; returns k + 1 borders, both ends included.

    Layer j holds, for every end, the least error of j intervals and the start of the last one. Starts never decrease as
    ends increase, so each lies between those of its neighbours: O(k n log n) in total.
    """
    size = len(sums.count) - 1
    least = np.full(size + 1, np.inf)
    least[1:] = sums.error(np.zeros(size, np.int64), np.arange(1, size + 1))
    begins = []
    for layer in range(2, min(k, size) + 1):
        least, begin = _next_layer(sums, least, layer)
        begins.append(begin)
    borders = [size]
    for begin in reversed(begins):
        borders.append(int(begin[borders[-1]]))
    return np.array([0, *reversed(borders)])


def _next_layer(sums: _Sums, least: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least errors with one more interval, and the start of the last interval, by bisection of the ends."""
    size = len(least) - 1
    better, begin = np.full(size + 1, np.inf), np.full(size + 2, size, np.int64)
    begin[:layer] = layer - 1
    step = 1 << size.bit_length()
    while step:
        ends = np.arange(step, size + 1, 2 * step)
        ends = ends[ends >= layer]
        if len(ends):
            low = np.maximum(begin[ends - step], layer - 1)
            high = np.minimum(np.where(ends + step <= size, begin[np.minimum(ends + step, size + 1)], size), ends - 1)
            better[ends], begin[ends] = _least_of_ranges(sums, least, ends, low, high)
        step //= 2
    return better, begin[:-1]


def _least_of_ranges(
    sums: _Sums, least: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each end, the least error over starts from low to high (inclusive), and the first such start."""
    lengths = high - low + 1
    first = np.cumsum(lengths) - lengths
    begin = np.arange(lengths.sum()) + np.repeat(low - first, lengths)
    error = least[begin] + sums.error(begin, np.repeat(ends, lengths))
    minimum = np.minimum.reduceat(error, first)
    hits = np.flatnonzero(error == np.repeat(minimum, lengths))
    return minimum, begin[hits[np.searchsorted(hits, first)]]
