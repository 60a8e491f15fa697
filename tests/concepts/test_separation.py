"""AUROC of pairs and its interval: against slow versions, by properties, by how often it holds the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from steersman.concepts.separation import Separation, auroc, effective_clusters, separation

scores = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


def slow_auroc(positive: list[float], negative: list[float], folds: list[int]) -> float:
    won: list[float] = []
    for (above, of_above), (below, of_below) in itertools.product(
        zip(positive, folds, strict=True), zip(negative, folds, strict=True)
    ):
        if of_above == of_below:
            won.append(1.0 if above > below else 0.5 if above == below else 0.0)
    return sum(won) / len(won)


def slow_obuchowski(positive: np.ndarray, negative: np.ndarray, clusters: np.ndarray) -> float:
    """The variance of Obuchowski 1997, in her own sums, where every cluster has both sides."""
    theta = slow_auroc(list(positive), list(negative), [0] * len(positive))
    names = sorted(set(clusters))
    count, pairs = len(names), len(positive)

    def wins(a: float, b: float) -> float:
        return 1.0 if a > b else 0.5 if a == b else 0.0

    of_positive = [np.mean([wins(x, y) for y in negative]) for x in positive]
    of_negative = [np.mean([wins(x, y) for x in positive]) for y in negative]
    first, second = (
        np.array([sum(v[i] - theta for i in range(pairs) if clusters[i] == c) for c in names])
        for v in (of_positive, of_negative)
    )
    s10 = count / ((count - 1) * pairs) * (first**2).sum()
    s01 = count / ((count - 1) * pairs) * (second**2).sum()
    s11 = count / (count - 1) * (first * second).sum()
    return float(s10 / pairs + s01 / pairs + 2 * s11 / pairs**2)


@given(st.data())
def test_auroc_is_the_share_of_comparisons_won(data: st.DataObject) -> None:
    positive = data.draw(scores)
    negative = data.draw(st.lists(st.integers(-3, 3), min_size=len(positive), max_size=len(positive)))
    folds = data.draw(st.lists(st.integers(0, 2), min_size=len(positive), max_size=len(positive)))
    assert auroc(positive, negative, folds) == pytest.approx(slow_auroc(positive, negative, folds))
    assert auroc(positive, negative) == pytest.approx(slow_auroc(positive, negative, [0] * len(positive)))


@given(st.data())
def test_interval_holds_its_auroc_and_turns_with_the_sides(data: st.DataObject) -> None:
    positive = data.draw(scores)
    size = len(positive)
    negative = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    clusters = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    found = separation(positive, negative, clusters)
    if len(set(clusters)) < 2:
        assert found is None
        return
    assert found is not None
    assert 0 <= found.low <= found.auroc <= found.high <= 1
    assert found.high - found.low > 0.05  # 12 pairs are never certain, also at AUROC 0 and 1
    turned = separation(negative, positive, clusters)
    assert turned is not None
    assert (1 - turned.auroc, 1 - turned.high, 1 - turned.low) == pytest.approx(
        (found.auroc, found.low, found.high)
    )


def test_interval_of_perfect_separation_is_newcombes() -> None:
    """At θ = 1 the score interval solves 1 − θ = z √V(θ); its size is that of clusters, not of pairs."""
    for groups, pairs_each in ((20, 1), (20, 7)):
        clusters = np.repeat(np.arange(groups), pairs_each)
        found = separation(np.ones(len(clusters)), np.zeros(len(clusters)), clusters)
        assert found is not None
        assert (found.auroc, found.high) == (1.0, 1.0)
        low = found.low
        variance = low * (1 - low) * (1 + 19 * ((1 - low) / (2 - low) + low / (1 + low))) / 400
        assert 1 - low == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    assert 0.8 < low < 0.9


def test_a_fold_of_one_cluster_each_is_a_share_with_wilsons_interval() -> None:
    positive, negative = np.array([1.0, 1, 1, 1, 1, 1, 0, 0]), np.full(8, 0.5)
    found = separation(positive, negative, np.arange(8), np.arange(8))
    wilson = stats.binomtest(6, 8).proportion_ci(method="wilson")
    assert found is not None
    assert found.auroc == 0.75
    assert found.low <= wilson.low + 1e-9  # the clustered interval may be wider
    assert found.high >= wilson.high - 1e-9
    every = separation(np.ones(8), np.zeros(8), np.arange(8), np.arange(8))
    assert every is not None
    assert every.low == pytest.approx(stats.binomtest(8, 8).proportion_ci(method="wilson").low)


def test_clusters_that_disagree_widen_it_as_obuchowski_says() -> None:
    """Eight clusters of 30 alike pairs, of which three are turned round: far fewer than 240 pairs."""
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(8), 30)
    shift = np.where(clusters < 5, 2.0, -2.0)
    positive, negative = shift + 0.1 * generator.normal(size=240), 0.1 * generator.normal(size=240)
    found = separation(positive, negative, clusters)
    half = stats.t.ppf(0.975, 7) * slow_obuchowski(positive, negative, clusters) ** 0.5
    theta = slow_auroc(list(positive), list(negative), [0] * 240)
    assert found is not None
    assert found.low == pytest.approx(max(0.0, theta - half))
    assert found.high == pytest.approx(min(1.0, theta + half))


def test_one_large_cluster_is_hardly_more_than_one() -> None:
    assert effective_clusters(np.array([4, 4, 4])) == 3
    sizes = np.array([97, 1, 1, 1])
    assert effective_clusters(sizes) == pytest.approx(1.0625, abs=1e-3)
    clusters = np.repeat(np.arange(4), sizes)
    even = separation(np.ones(100), np.zeros(100), np.repeat(np.arange(4), 25))
    uneven = separation(np.ones(100), np.zeros(100), clusters)
    assert even is not None
    assert uneven is not None
    assert uneven.low < even.low - 0.1


def test_one_cluster_says_nothing() -> None:
    assert separation([1, 2], [0, 0], ["a", "a"]) is None


def draw_pairs(
    generator: np.random.Generator, gap: float, groups: int, pairs_each: int, alike: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Binormal scores: of their variance 1 the share `alike` is each cluster's and side's own."""
    clusters = np.repeat(np.arange(groups), pairs_each)
    own = generator.normal(size=(2, groups)) * alike**0.5
    noise = generator.normal(size=(2, len(clusters))) * (1 - alike) ** 0.5
    return gap + own[0][clusters] + noise[0], own[1][clusters] + noise[1], clusters


def coverage(draws: int, gap: float, groups: int, pairs_each: int, alike: float, folds: int) -> float:
    generator = np.random.default_rng(int(100 * gap) + groups)
    truth = float(stats.norm.cdf(gap / 2**0.5))
    held = 0
    for _ in range(draws):
        positive, negative, clusters = draw_pairs(generator, gap, groups, pairs_each, alike)
        found = separation(positive, negative, clusters, clusters % folds)
        assert isinstance(found, Separation)
        held += found.low <= truth <= found.high
    return held / draws


@pytest.mark.parametrize("gap", [0.0, 1.5, 3.0])
def test_interval_holds_the_truth(gap: float) -> None:
    """300 draws tell .95 to within .026: below .92 would be chance in one of a hundred."""
    assert coverage(300, gap, groups=20, pairs_each=3, alike=0.5, folds=5) >= 0.92


@pytest.mark.long
@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("groups", [10, 40])
@pytest.mark.parametrize(("pairs_each", "alike"), [(1, 0.0), (5, 0.1), (5, 0.9)])
@pytest.mark.parametrize("folds", [1, 5])
def test_interval_holds_the_truth_widely(
    gap: float, groups: int, pairs_each: int, alike: float, folds: int
) -> None:
    assert coverage(1000, gap, groups, pairs_each, alike, folds) >= 0.935
