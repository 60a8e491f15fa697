"""Statistics against published values, slow obvious versions, properties and simulated experiments."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from steersman.evaluation import statistics
from steersman.evaluation.statistics import (
    clustered_mean,
    mcnemar_p,
    paired_difference,
    random_control,
    rate,
    wilson,
)

Z = float(stats.norm.ppf(0.975))


def paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


# Wilson -----------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.data())
def test_wilson_limits_solve_the_score_equation(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    found = wilson(successes, count)
    share = successes / count
    for limit in (found.low, found.high):
        assert abs((share - limit) ** 2 - Z**2 * limit * (1 - limit) / count) < 1e-12
    assert 0 <= found.low <= found.rate <= found.high <= 1


def test_wilson_published_values() -> None:
    # Newcombe, Statistics in Medicine 17, 857-872 (1998), table I, method 3.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ]:
        found = wilson(successes, count)
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_rate(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        wilson(successes, count)


def test_rate_without_groups_and_with_groups_of_one_is_wilson() -> None:
    outcomes = [True] * 7 + [False] * 13
    plain = wilson(7, 20)
    assert rate(outcomes) == plain
    assert rate(outcomes, list(range(20))) == plain


def test_groups_of_copies_count_once() -> None:
    """Ten copies of each of 40 observations say no more than the 40 do (and a little less for few degrees of
    freedom)."""
    outcomes = np.random.default_rng(0).random(40) < 0.4
    copied = rate(np.repeat(outcomes, 10), np.repeat(np.arange(40), 10).tolist())
    few = (Z / stats.t.ppf(0.975, 39)) ** 2
    assert copied.effective_count == pytest.approx(400 * 39 / 399 * few, rel=1e-9)
    alone = wilson(int(outcomes.sum()), 40)
    assert copied.low < alone.low
    assert copied.high > alone.high


# Paired differences -----------------------------------------------------------------------------------


def slow_tango(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Inverts the score test, its nuisance parameter found by maximising the multinomial likelihood
    numerically."""

    def score(delta: float) -> float:
        def loss(q: float) -> float:  # q = P(only first), q + delta = P(only second)
            cells = [
                (only_first, q),
                (only_second, q + delta),
                (count - only_first - only_second, 1 - 2 * q - delta),
            ]
            return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

        low, high = max(0.0, -delta), (1 - delta) / 2
        q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        variance = count * (2 * q + delta - delta**2)
        return (only_second - only_first - count * delta) / math.sqrt(variance)

    grid = np.linspace(-0.999, 0.999, 400)
    inside = grid[[abs(score(delta)) <= Z for delta in grid]]
    step = grid[1] - grid[0]
    edges = [(inside.min() - step, inside.min(), Z), (inside.max(), inside.max() + step, -Z)]
    low, high = (
        optimize.brentq(lambda delta, level=level: score(delta) - level, a, b) for a, b, level in edges
    )
    return float(low), float(high)


@pytest.mark.parametrize(
    "table", [(1, 1, 7, 12), (59, 6, 16, 80), (20, 12, 2, 16), (5, 0, 9, 6), (43, 0, 1, 0)]
)
def test_tango_equals_the_slow_version(table: tuple[int, int, int, int]) -> None:
    found = paired_difference(*paired(*table))
    low, high = slow_tango(table[1], table[2], sum(table))
    assert found.low == pytest.approx(low, abs=1e-5)
    assert found.high == pytest.approx(high, abs=1e-5)


def test_tango_published_values() -> None:
    # Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2850-2875 (2014): airway hyper-responsiveness.
    found = paired_difference(*paired(1, 1, 7, 12))
    assert (round(found.low, 3), round(found.high, 3)) == (0.026, 0.517)
    assert found.difference == pytest.approx(6 / 21)
    assert found.p == pytest.approx(0.0703, abs=5e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_difference_is_antisymmetric_and_holds_its_estimate(rows: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in rows], [b for _, b in rows]
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert forth.difference == pytest.approx(-back.difference)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert -1 <= forth.low <= forth.difference + 1e-12
    assert forth.difference - 1e-12 <= forth.high <= 1
    assert forth.p == back.p
    assert forth.low < forth.high


def test_all_or_nothing_keeps_a_width() -> None:
    found = paired_difference([False] * 50, [True] * 50)
    assert found.difference == found.high == 1.0
    assert 0.8 < found.low < 1.0


def test_mcnemar_is_a_fair_coin() -> None:
    for lost, gained in itertools.product(range(8), repeat=2):
        n, k = lost + gained, min(lost, gained)
        by_hand = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
        assert mcnemar_p(lost, gained) == pytest.approx(by_hand)


def test_sign_flips_of_whole_groups_equal_enumeration() -> None:
    groups = [0, 0, 0, 1, 1, 2, 3, 3, 4]
    first, second = [0] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 1]
    sums = [3, 2, 1, 1]
    flips = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True))) >= 7
        for signs in itertools.product((1, -1), repeat=4)
    ]
    assert paired_difference(first, second, groups).p == pytest.approx(sum(flips) / 16)


def test_swapping_within_a_group_of_two_is_not_hidden_by_groups() -> None:
    """Opposite changes within a group cancel; the design effect must not make the interval narrower than
    independent."""
    first, second = [0, 1] * 30, [1, 0] * 30
    grouped = paired_difference(first, second, [i // 2 for i in range(60)])
    alone = paired_difference(first, second)
    assert grouped.low <= alone.low
    assert grouped.high >= alone.high


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(("start", "end"), [(0.5, 0.6), (0.1, 0.9), (0.7, 0.98)])
def test_intervals_cover_in_simulated_experiments(
    start: float, end: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nominal coverage over 400 experiments of 320 items in groups of `size` that share half of their
    luck."""
    monkeypatch.setattr(statistics, "FLIPS", 1)  # the p-value is not looked at here
    generator = np.random.default_rng(1)
    clusters = 320 // size
    groups = np.repeat(np.arange(clusters), size).tolist()
    hits = np.zeros(2)
    for _ in range(400):
        shared = stats.norm.ppf(generator.random((clusters, 1)))
        own = stats.norm.ppf(generator.random((clusters, size)))
        luck = stats.norm.cdf((shared + own) / math.sqrt(2)).ravel()
        second_luck = np.where(generator.random(320) < 0.5, luck, generator.random(320))
        first, second = luck < start, second_luck < end
        difference = paired_difference(first, second, groups)
        share = rate(first, groups)
        hits += [difference.low <= end - start <= difference.high, share.low <= start <= share.high]
    assert (hits / 400 > 0.925).all(), hits / 400
    assert (hits / 400 < 0.985).all(), hits / 400


# Means -----------------------------------------------------------------------------------


def test_clustered_mean_equals_the_loop() -> None:
    generator = np.random.default_rng(2)
    values, groups = generator.normal(size=50), generator.integers(0, 9, size=50).tolist()
    found = clustered_mean(values, groups)
    mean = sum(values) / 50
    squares = 0.0
    for group in set(groups):
        squares += sum(x - mean for x, g in zip(values, groups, strict=True) if g == group) ** 2
    error = math.sqrt(len(set(groups)) / (len(set(groups)) - 1) * squares) / 50
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(error)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, len(set(groups)) - 1) * error)


def test_mean_without_groups_is_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(size=25)
    found = clustered_mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_group_gives_no_interval_and_says_null() -> None:
    found = clustered_mean([1.0, 2.0], ["a", "a"])
    assert math.isnan(found.low)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["low"] is None


# The random control -----------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=50), st.integers(-6, 6))
def test_random_control_counts(draws: list[int], observed: int) -> None:
    found = random_control(observed, draws)
    assert found.p == (1 + sum(draw >= observed for draw in draws)) / (len(draws) + 1)
    assert 1 / (len(draws) + 1) <= found.p <= 1


def test_random_control_is_level_under_exchangeability() -> None:
    """Were the plan one of the random ones, p ≤ 0.1 would come in a tenth of the experiments; in a fifth
    where the direction is chosen after the effect was seen, and compared by itself.
    """
    effects = np.random.default_rng(4).normal(size=(4000, 20))
    for sides in (False, True):
        share = np.mean([random_control(row[0], row[1:], two_sided=sides).p <= 0.1 for row in effects])
        assert abs(share - 0.1) < 0.02
    chosen = np.sign(effects[:, :1]) * effects
    assert np.mean([random_control(row[0], row[1:]).p <= 0.1 for row in chosen]) > 0.17


@pytest.mark.parametrize(
    "broken",
    [
        lambda: paired_difference([1, 0], [1]),
        lambda: paired_difference([1, 2], [1, 0]),
        lambda: paired_difference([1, 0], [0, 1], ["a"]),
        lambda: paired_difference([1, 0], [0, 1], ["a", "a"]),
        lambda: rate([]),
        lambda: clustered_mean([]),
        lambda: random_control(1.0, []),
        lambda: random_control(math.nan, [1.0]),
    ],
)
def test_nonsense_is_refused(broken) -> None:
    with pytest.raises(ValueError):
        broken()


def test_figures_are_plain_json() -> None:
    for figure in (
        wilson(1, 3),
        paired_difference([1, 0], [0, 0]),
        clustered_mean([1.0, 3.0]),
        random_control(1.0, [0.5]),
    ):
        assert (
            json.loads(json.dumps(figure.to_json(), allow_nan=False))[
                "level" if hasattr(figure, "level") else "p"
            ]
            > 0
        )
