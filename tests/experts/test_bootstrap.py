"""Bootstrap weights that are Poisson and depend on nothing but id and replicate; replicates that merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from steersman import PairsError
from steersman.experts.bootstrap import Replicates, poisson_weights

RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(-(1 << 63), (1 << 63) - 1, 4000)


def test_weights_are_poisson_for_ids_and_for_replicates() -> None:
    weights = poisson_weights(IDS, np.arange(50))
    assert weights.shape == (50, 4000)
    values = np.arange(6)
    expected = np.append(stats.poisson.pmf(values[:-1], 1), stats.poisson.sf(values[-2], 1))
    counts = np.array([(np.minimum(weights, 5) == value).sum() for value in values])
    assert stats.chisquare(counts, expected * weights.size).pvalue > 1e-3
    assert weights.mean() == pytest.approx(1, abs=5 / math.sqrt(weights.size))


def test_weights_of_neighbours_are_independent() -> None:
    """Also where ids are small numbers that differ in one bit."""
    weights = poisson_weights(np.arange(5000), np.arange(3)).astype(float)
    noise = 5 / math.sqrt(5000)
    assert abs(np.corrcoef(weights)[np.triu_indices(3, 1)]).max() < noise
    assert abs(np.corrcoef(weights[0][:-1], weights[0][1:])[0, 1]) < noise
    assert abs(np.corrcoef(weights[0][::2], weights[0][1::2])[0, 1]) < 5 / math.sqrt(2500)


def test_weights_depend_on_nothing_else() -> None:
    """These numbers are part of the format: other ones would part shards of different versions."""
    ids = np.array([0, 1, -1, 2**63 - 1, -(2**63)])
    assert poisson_weights(ids, np.arange(3)).tolist() == KNOWN
    np.testing.assert_array_equal(poisson_weights(ids[[3]], np.array([2])), [[KNOWN[2][3]]])


KNOWN = [[1, 2, 1, 1, 1], [1, 2, 4, 3, 2], [2, 3, 0, 2, 0]]


def sums(places: np.ndarray, scale: int = 1) -> Replicates:
    made = np.random.default_rng(1)
    n = made.integers(1, 9, (30, 2)) * scale
    a = (n[:, :, None, None] // 2) * np.ones((2, 3), np.int64)
    replicates = Replicates.zeros(20, 2, 2, 3)
    replicates.add(IDS[places], a[places], n[places])
    return replicates


def test_sums_are_those_of_weighted_clusters() -> None:
    found, weights = sums(np.arange(30)), poisson_weights(IDS[:30], np.arange(20))
    made = np.random.default_rng(1).integers(1, 9, (30, 2))
    for r in range(20):
        assert found.tokens[r].tolist() == [sum(weights[r] * made[:, side]) for side in (0, 1)]
        assert found.activations[r, 1, 1, 2] == sum(weights[r] * (made[:, 1] // 2))


@pytest.mark.parametrize("scale", [1, 1 << 50])
def test_parts_in_any_order_are_the_whole(scale: int) -> None:
    whole, order = sums(np.arange(30), scale), np.random.default_rng(2).permutation(30)
    merged = sums(order[:7], scale) + (sums(order[7:8], scale) + sums(order[8:], scale))
    np.testing.assert_array_equal(merged.activations, whole.activations)
    np.testing.assert_array_equal(merged.tokens, whole.tokens)


def test_sums_beyond_64_bits_are_refused() -> None:
    with pytest.raises(PairsError, match="too many pairs for a bootstrap"):
        sums(np.arange(30), 1 << 58)
    with pytest.raises(PairsError, match="too many pairs for a bootstrap"):
        sums(np.arange(5), 1 << 57) + sums(np.arange(5, 10), 1 << 57)
