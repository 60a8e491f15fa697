"""What is left of a contrast without a nuisance: least squares, and the size of its error."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.experts.adjustment import adjust, adjusted_replicates, slope_of
from steersman.experts.estimate import Estimate

RANDOM = np.random.default_rng(0)


def estimate(delta: np.ndarray, error: float, clusters: int = 50) -> Estimate:
    return Estimate(delta, np.full(delta.shape, error), clusters)


def test_the_slope_is_that_of_least_squares() -> None:
    nuisance = RANDOM.normal(size=(4, 8))
    delta = 0.7 * nuisance + RANDOM.normal(size=(4, 8)) / 10
    expected, *_ = np.linalg.lstsq(nuisance.reshape(-1, 1), delta.ravel(), rcond=None)
    slope, share = slope_of(delta, nuisance)
    assert slope == pytest.approx(expected[0], rel=1e-12)
    left = delta - slope * nuisance
    assert share == pytest.approx(1 - (left**2).sum() / (delta**2).sum(), rel=1e-9)
    assert (left * nuisance).sum() == pytest.approx(0, abs=1e-12)


def test_the_nuisance_itself_leaves_nothing_and_nothing_takes_nothing_away() -> None:
    delta = RANDOM.normal(size=(4, 8)) / 10
    found = adjust(estimate(delta, 0.1), estimate(delta, 0.1))
    assert found.slope == pytest.approx(1)
    np.testing.assert_allclose(found.estimate.difference, 0, atol=1e-15)
    found = adjust(estimate(delta, 0.1), estimate(delta * 0, 0.1))
    assert (found.slope, found.share) == (0, 0)
    np.testing.assert_array_equal(found.estimate.difference, delta)


def test_places_without_an_expert_do_not_count() -> None:
    delta, nuisance = RANDOM.normal(size=(2, 4)), RANDOM.normal(size=(2, 4))
    delta[1, 3] = nuisance[1, 3] = np.nan
    inside = ~np.isnan(delta)
    assert slope_of(delta, nuisance)[0] == pytest.approx(
        (delta[inside] * nuisance[inside]).sum() / (nuisance[inside] ** 2).sum()
    )
    assert np.isnan(adjust(estimate(delta, 0.1), estimate(nuisance, 0.1)).estimate.difference[1, 3])


def test_errors_of_independent_and_of_dependent_contrasts() -> None:
    delta = np.array([[0.2, -0.2]])
    found = adjust(estimate(delta, 0.03, 40), estimate(delta / 2, 0.02, 25))
    assert found.slope == pytest.approx(2)
    np.testing.assert_allclose(found.estimate.standard_error, 0.05)
    assert found.estimate.clusters == 25
    together = adjust(estimate(delta, 0.03), estimate(delta / 2, 0.02), dependent=True)
    np.testing.assert_allclose(together.estimate.standard_error, 0.07)


def test_the_interval_of_independent_contrasts_covers() -> None:
    """Planted Δ = b·nuisance + effect, both seen with noise: intervals hold it as often as said."""
    layers, experts, error, runs = 20, 30, 0.02, 200
    nuisance = RANDOM.normal(size=(layers, experts)) / 4
    effect = np.zeros((layers, experts))
    effect[3, 4], effect[5, 6] = 0.2, -0.2
    effect -= slope_of(effect, nuisance)[0] * nuisance  # what lies along the nuisance cannot be told from it
    hits = 0.0
    for _ in range(runs):
        noise = RANDOM.normal(size=(2, layers, experts)) * error
        found = adjust(
            estimate(0.5 * nuisance + effect + noise[0], error, 5000),
            estimate(nuisance + noise[1], error, 5000),
        ).estimate
        low, high = found.interval()
        hits += ((low <= effect) & (effect <= high)).mean() / runs
    assert 0.94 < hits < 0.96


def test_replicates_have_slopes_of_their_own() -> None:
    delta, nuisance = RANDOM.normal(size=(3, 2, 5)), RANDOM.normal(size=(3, 2, 5))
    found = adjusted_replicates(delta, nuisance)
    for row in range(3):
        assert (found[row] * nuisance[row]).sum() == pytest.approx(0, abs=1e-12)
