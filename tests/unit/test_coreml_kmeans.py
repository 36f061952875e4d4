"""Clusters on a line: as good as the best there are, and always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.coreml import kmeans
from sfumato.coreml.kmeans import cluster


def error(values, counts, centres):
    distances = np.abs(values[:, None] - centres[None, :]).min(axis=1)
    return float(counts @ distances**2)


def least_error(values, counts, k):
    """By trying every way of parting the values into at most k intervals, one after the other."""
    size = len(values)
    least = [[np.inf] * (size + 1) for _ in range(k + 1)]
    least[0][0] = 0.0
    for clusters in range(1, k + 1):
        for end in range(size + 1):
            least[clusters][end] = least[clusters - 1][end]
            for begin in range(end):
                some, weights = values[begin:end], counts[begin:end]
                own = error(some, weights, np.array([some @ weights / weights.sum()]))
                least[clusters][end] = min(least[clusters][end], least[clusters - 1][begin] + own)
    return least[k][size]


@st.composite
def samples(draw):
    numbers = st.one_of(st.integers(-40, 40).map(float), st.floats(-1e3, 1e3, width=16))
    values = np.unique(np.array(draw(st.lists(numbers, min_size=1, max_size=22))))
    counts = np.array(draw(st.lists(st.integers(1, 50), min_size=len(values), max_size=len(values))), np.float64)
    return values, counts


@settings(max_examples=200, deadline=None)
@given(sample=samples(), k=st.integers(1, 8))
def test_no_centres_are_better(sample, k):
    values, counts = sample
    centres = cluster(values, counts, k)
    assert 1 <= len(centres) <= k
    assert np.all(np.diff(centres) > 0)
    best = least_error(values, counts, k)
    assert error(values, counts, centres) <= best * (1 + 1e-9) + 1e-9 * float(counts @ values**2)


@settings(max_examples=50, deadline=None)
@given(sample=samples())
def test_few_different_values_are_kept_as_they_are(sample):
    values, counts = sample
    assert np.array_equal(cluster(values, counts, len(values)), values)


@pytest.mark.parametrize("k", [2, 4, 16, 64, 256])
@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "two heaps", "even"])
def test_groups_cost_little(kind, k, monkeypatch):
    """With more values than groups the error is within one per cent of the optimum over every single value."""
    random = np.random.default_rng(5)
    weights = {
        "normal": random.normal(size=60_000) * 0.03,
        "laplace": random.laplace(size=60_000) * 0.02,
        "outlier": np.append(random.normal(size=60_000) * 0.01, 8.0),
        "two heaps": np.concatenate([random.normal(size=30_000) * 1e-3, 1 + random.normal(size=30_000) * 0.1]),
        "even": random.uniform(-1, 1, 60_000),
    }[kind]
    values, counts = np.unique(weights.astype(np.float16).astype(np.float64), return_counts=True)
    assert len(values) > kmeans.GROUPS
    grouped = error(values, counts, cluster(values, counts.astype(np.float64), k))
    monkeypatch.setattr(kmeans, "GROUPS", len(values))
    exact = error(values, counts, cluster(values, counts.astype(np.float64), k))
    assert exact <= grouped * (1 + 1e-12)
    assert grouped <= exact * 1.01


def test_values_far_from_zero_lose_nothing():
    values = 30_000 + np.arange(64) * 16.0
    centres = cluster(values, np.ones(64), 4)
    assert np.allclose(centres, 30_000 + 16 * np.array([7.5, 23.5, 39.5, 55.5]), atol=1e-6)
