"""Directions of pairs in chunks: against loops over everything, by properties."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.concepts.directions import (
    Pass,
    fold_of,
    held_out_scores,
    mean_differences,
    principal_directions,
    shuffled_directions,
    unit_of,
)


def in_chunks(states: np.ndarray, size: int) -> Pass:
    def through() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(states), size):
            yield slice(start, start + size), states[start : start + size]

    return through


def draw(seed: int, pairs: int, clusters: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """States [pairs, 2, width], and each pair's cluster number; every cluster has a pair."""
    generator = np.random.default_rng(seed)
    numbers = np.sort(
        np.concatenate([np.arange(clusters), generator.integers(0, clusters, pairs - clusters)])
    )
    states = generator.normal(size=(pairs, 2, width)).astype(np.float32)
    states[:, 0] += generator.normal(size=width)
    return states, numbers


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 20), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=60)
def test_means_are_those_of_loops_in_any_chunks(
    seed: int, clusters: int, more: int, width: int, size: int
) -> None:
    states, numbers = draw(seed, clusters + more, clusters, width)
    found = mean_differences(in_chunks(states, size), numbers)
    of_pairs = [pair[0].astype(np.float64) - pair[1] for pair in states]
    np.testing.assert_allclose(found.whole, sum(of_pairs) / len(of_pairs), atol=1e-12)
    assert len(found.of_folds) == (0 if clusters == 1 else min(5, clusters))
    for fold, direction in enumerate(found.of_folds):
        rest = [d for d, number in zip(of_pairs, numbers, strict=True) if number % min(5, clusters) != fold]
        np.testing.assert_allclose(direction, sum(rest) / len(rest), atol=1e-12)
    for unit, total in enumerate(found.unit_sums):
        own = [d for d, number in zip(of_pairs, numbers, strict=True) if number == unit]
        np.testing.assert_allclose(total, sum(own), atol=1e-12)


def test_more_clusters_than_units_share_them_within_a_fold() -> None:
    numbers = np.arange(230)
    units = unit_of(numbers)
    assert len(set(units.tolist())) == 100
    assert all(len(set(fold_of(numbers)[units == unit].tolist())) == 1 for unit in range(100))
    states, _ = draw(0, 230, 230, 3)
    found = mean_differences(in_chunks(states, 50), numbers)
    differences = states[:, 0].astype(np.float64) - states[:, 1]
    for fold, direction in enumerate(found.of_folds):
        np.testing.assert_allclose(direction, differences[fold_of(numbers) != fold].mean(0), atol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(0, 20), st.integers(1, 9))
@settings(max_examples=40)
def test_principal_directions_are_those_of_a_whole_eigendecomposition(
    seed: int, clusters: int, more: int, width: int
) -> None:
    states, numbers = draw(seed, clusters + more, clusters, width)
    states[:, 0] += 3.0  # a gap between the first eigenvalue and the others
    folds = fold_of(numbers)
    through = in_chunks(states, 5)
    means = mean_differences(through, numbers)
    found = principal_directions(through, folds, means)
    differences = states[:, 0].astype(np.float64) - states[:, 1]
    for direction, members in [
        (found.whole, np.ones(len(folds), bool)),
        *((direction, folds != fold) for fold, direction in enumerate(found.of_folds)),
    ]:
        some = differences[members]
        top = np.linalg.eigh(some.T @ some)[1][:, -1]
        expected = top * (top @ some.mean(0))
        np.testing.assert_allclose(direction, expected, atol=1e-3 * np.linalg.norm(expected))
        assert direction @ some.mean(0) >= 0  # oriented along the mean
    np.testing.assert_array_equal(found.unit_sums, means.unit_sums)


def of_repeng(states: np.ndarray, method: str) -> np.ndarray:
    """What its `read_representations` computes: the first component by a singular value decomposition of the
    centred rows, as scikit-learn's PCA; the sign for which most positive sides are larger.
    """
    positive, negative = states[:, 0].astype(np.float64), states[:, 1].astype(np.float64)
    centre = (positive + negative) / 2
    rows = positive - negative
    if method == "pca_center":
        rows = np.concatenate([positive - centre, negative - centre])
    direction = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][0]
    larger, smaller = (
        ((positive - negative) @ direction > 0).mean(),
        ((positive - negative) @ direction < 0).mean(),
    )
    return -direction if smaller > larger else direction


@pytest.mark.parametrize(("centred", "method"), [(False, "pca_center"), (True, "pca_diff")])
@pytest.mark.parametrize("seed", range(6))
def test_principal_directions_are_those_of_repeng(seed: int, centred: bool, method: str) -> None:
    generator = np.random.default_rng(seed)
    states = generator.normal(size=(40, 2, 12)).astype(np.float32)
    concept, nuisance = generator.normal(size=(2, 12))
    states[:, 0] += (9 + generator.normal(size=(40, 1)) * 0.2) * concept  # that all pairs share
    states[:, 0] += (0.5 + 4 * generator.normal(size=(40, 1))) * nuisance  # in which they differ
    numbers = np.arange(40)
    folds = fold_of(numbers)
    through = in_chunks(states, 7)
    means = mean_differences(through, numbers)
    found = principal_directions(through, folds, means, centred=centred)
    direction = of_repeng(states, method)
    along = found.whole / np.linalg.norm(found.whole)
    assert abs(along @ direction) > 1 - 1e-6
    assert along @ means.whole > 0
    np.testing.assert_allclose(np.linalg.norm(found.whole), abs(direction @ means.whole), rtol=1e-5)
    for fold, one in enumerate(found.of_folds):
        alone = of_repeng(states[folds != fold], method)
        assert abs(one @ alone) > (1 - 1e-6) * np.linalg.norm(one)
    plain = principal_directions(through, folds, means, centred=not centred).whole
    assert abs(plain @ direction) < 0.999 * np.linalg.norm(plain), "the other method is another direction"


@pytest.mark.parametrize("width", [1, 4])
def test_differences_that_do_not_vary_have_no_direction_in_which_they_do(width: int) -> None:
    states = np.random.default_rng(0).normal(size=(6, 2, width))
    states[:, 0] = states[:, 1] + 2.0
    folds = fold_of(np.arange(6))
    through = in_chunks(states, 4)
    means = mean_differences(through, np.arange(6))
    assert not principal_directions(through, folds, means, centred=True).whole.any()
    np.testing.assert_allclose(principal_directions(through, folds, means).whole, 2.0)


def test_half_of_the_units_are_swapped() -> None:
    sizes = np.array([1, 2, 1, 1, 3, 1, 1])
    found = shuffled_directions(np.eye(7) * sizes, sizes, draws=40, seed=5)
    signs = np.where(found > found.mean(1, keepdims=True), 1, -1)  # up to what imbalance takes off
    assert (signs < 0).sum(1).tolist() == [3] * 40
    middle = (signs @ sizes / sizes.sum())[:, None]
    np.testing.assert_allclose(found, (signs - middle) * sizes / sizes.sum(), atol=1e-15)
    assert len({tuple(row) for row in signs.tolist()}) > 10
    assert (found != shuffled_directions(np.eye(7) * sizes, sizes, draws=40, seed=6)).any()


@pytest.mark.parametrize("clusters", [4, 7])
def test_shuffling_leaves_nothing_of_a_concept_without_noise(clusters: int) -> None:
    """Also where clusters are odd in number and uneven: what remains is noise, and here is none."""
    numbers = np.repeat(np.arange(clusters), np.arange(1, clusters + 1))
    states = np.zeros((len(numbers), 2, 3), np.float32)
    states[:, 0] = [1.0, -2.0, 0.5]
    found = mean_differences(in_chunks(states, 4), numbers)
    shuffled = shuffled_directions(found.unit_sums, np.bincount(numbers), draws=20)
    np.testing.assert_allclose(shuffled, 0, atol=1e-15)
    np.testing.assert_allclose(found.whole, [1.0, -2.0, 0.5])


def test_folds_go_round_and_one_cluster_has_none() -> None:
    assert fold_of(np.array([0, 0, 1, 2, 3, 4, 5, 6])).tolist() == [0, 0, 1, 2, 3, 4, 0, 1]
    assert fold_of(np.array([0, 1, 2])).tolist() == [0, 1, 2]
    assert fold_of(np.array([0, 0])).tolist() == [-1, -1]


def test_scores_are_projections_on_the_direction_of_the_pairs_fold() -> None:
    states, numbers = draw(3, 11, 6, 4)
    directions = np.random.default_rng(0).normal(size=(5, 4))
    folds = fold_of(numbers)
    found = held_out_scores(in_chunks(states, 3), folds, directions)
    for pair in range(11):
        for side in (0, 1):
            assert found[pair, side] == pytest.approx(float(states[pair, side] @ directions[folds[pair]]))
