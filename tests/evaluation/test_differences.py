"""Differences, corrections, detectable differences and the cluster bootstrap: slow versions, statsmodels,
and simulated experiments in which they must keep their level.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from steersman.evaluation import statistics
from steersman.evaluation.statistics import (
    bootstrap_interval,
    detectable_difference,
    holm,
    mcnemar_p,
    mean_difference,
    paired_difference,
    rate,
)


def test_mean_difference_is_the_cluster_robust_regression_on_a_constant() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 5)
    first = generator.normal(size=60)
    second = first + generator.normal(size=60) + generator.normal(size=12)[groups]
    found = mean_difference(first, second, groups.tolist())
    fitted = sm.OLS(second - first, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True}, use_t=True
    )
    assert found.difference == pytest.approx(fitted.params[0])
    assert found.standard_error == pytest.approx(fitted.bse[0])
    assert found.p == pytest.approx(fitted.pvalues[0])
    assert (found.low, found.high) == pytest.approx(tuple(fitted.conf_int()[0]))


def test_without_groups_it_is_the_paired_t_test() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(2, 30))
    expected = stats.ttest_rel(second, first)
    assert mean_difference(first, second).p == pytest.approx(expected.pvalue)


def test_nothing_changed_and_everything_alike() -> None:
    assert mean_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p == 1.0
    assert mean_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]).p == 0.0
    assert math.isnan(mean_difference([1.0, 2.0], [2.0, 4.0], ["a", "a"]).p)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(math.nan)), max_size=8))
def test_holm_equals_the_step_down_written_out(values: list[float | None]) -> None:
    known = sorted(value for value in values if value is not None and not math.isnan(value))
    highest, table = 0.0, {}
    for place, value in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * value))
        table[value] = highest
    for value, adjusted in zip(values, holm(values), strict=True):
        if value is None or math.isnan(value):
            assert adjusted is None
        else:
            assert adjusted == pytest.approx(table[value])


def test_holm_equals_statsmodels() -> None:
    for size in (1, 2, 7):
        values = np.random.default_rng(size).random(size) / size
        assert holm(values.tolist()) == pytest.approx(multipletests(values, method="holm")[1].tolist())


@given(st.integers(20, 2000), st.floats(0, 0.5))
def test_detectable_difference_shrinks_with_items_and_grows_with_noise(count: int, noise: float) -> None:
    found = [detectable_difference(n, noise) for n in (count, 2 * count, 4 * count)]
    assert all(small <= large for large, small in pairwise(found))
    assert detectable_difference(count, noise) <= detectable_difference(count, noise + 0.1) + 1e-9


@pytest.mark.parametrize(("count", "discordant"), [(100, 0.0), (300, 0.0), (300, 0.3)])
def test_detectable_difference_is_found_four_times_in_five(count: int, discordant: float) -> None:
    """Power of the exact test at that difference, which is a little less than the formula's 80 %."""
    delta = detectable_difference(count, discordant)
    share = max(discordant, delta)
    generator = np.random.default_rng(2)
    table = generator.multinomial(count, [(share + delta) / 2, (share - delta) / 2, 1 - share], size=2000)
    power = np.mean([mcnemar_p(int(lost), int(gained)) < 0.05 for gained, lost, _ in table])
    assert 0.7 < power < 0.88


def test_bootstrap_is_the_loop_over_drawn_groups() -> None:
    generator = np.random.default_rng(3)
    groups = generator.integers(0, 15, size=80)
    values = generator.normal(size=80) + groups / 10
    low, high = bootstrap_interval(values, groups.tolist())
    means = []
    for _ in range(4000):
        drawn = generator.choice(np.unique(groups), size=len(np.unique(groups)))
        means.append(np.concatenate([values[groups == group] for group in drawn]).mean())
    expected = np.percentile(means, [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03)
    assert all(map(math.isnan, bootstrap_interval([1.0, 2.0], ["a", "a"])))
    assert bootstrap_interval(values, groups.tolist()) == (low, high)


# Simulated experiments ---------------------------------------------------------------------------


def answers(
    generator: np.random.Generator, clusters: int, size: int, start: float, end: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two conditions on the same items, groups of which share a third of their luck."""
    shared = generator.normal(size=(clusters, 1))
    own = generator.normal(size=(clusters, size))
    luck = stats.norm.cdf((shared + math.sqrt(2) * own) / math.sqrt(3)).ravel()
    second = np.where(generator.random(luck.size) < 0.5, luck, generator.random(luck.size))
    return luck < start, second < end


@pytest.mark.long
@pytest.mark.parametrize(("clusters", "size"), [(100, 1), (300, 1), (30, 10), (60, 5)])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.2), (0.3, 0.3), (0.5, 0.7), (0.9, 0.8)])
def test_intervals_cover_within_two_points(
    clusters: int, size: int, start: float, end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "FLIPS", 1)  # the p-value is not looked at here
    experiments, generator = 5000, np.random.default_rng([clusters, size, int(100 * start)])
    groups = np.repeat(np.arange(clusters), size).tolist()
    hits = np.zeros(3)
    for _ in range(experiments):
        first, second = answers(generator, clusters, size, start, end)
        difference, share = paired_difference(first, second, groups), rate(first, groups)
        mean = mean_difference(first, second, groups)
        truth = end - start
        hits += [share.low <= start <= share.high, difference.low <= truth <= difference.high,
                 mean.low <= truth <= mean.high]  # fmt: skip
    assert (np.abs(hits / experiments - 0.95) < 0.02).all(), hits / experiments


@pytest.mark.long
@pytest.mark.parametrize(("clusters", "size"), [(100, 1), (30, 10)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tests_keep_their_level(
    clusters: int, size: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing differs, p < .05 comes in at most a twentieth of the experiments."""
    monkeypatch.setattr(statistics, "FLIPS", 999)
    generator, groups = np.random.default_rng(5), np.repeat(np.arange(clusters), size).tolist()
    found = np.zeros(2)
    experiments = 1500
    for _ in range(experiments):
        first, second = answers(generator, clusters, size, share, share)
        paired = paired_difference(first, second, groups).p
        found += [paired < 0.05, mean_difference(first, second, groups).p < 0.05]
    assert found[0] / experiments < 0.065
    assert abs(found[1] / experiments - 0.05) < 0.02
