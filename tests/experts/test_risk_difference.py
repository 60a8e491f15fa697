"""Risk differences against exact fractions, properties of their sums, and the coverage of their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import fdrcorrection

from steersman.experts import risk_difference as rd
from steersman.experts.estimate import q_values
from steersman.experts.risk_difference import ClusterSums

LAYERS, EXPERTS = 2, 3


@dataclass(frozen=True)
class Cluster:
    """One unit: activations [layers][experts] of tokens, on either side."""

    a1: list[list[int]]
    n1: int
    a2: list[list[int]]
    n2: int


@st.composite
def experiment(draw: st.DrawFn, least: int = 20, most: int = 30, largest: int = 60) -> list[Cluster]:
    """Clusters of up to `largest` tokens a side; from a seed, for a list of that many draws takes long."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    extreme = draw(st.sampled_from([0.0, 0.2, 0.5]))  # how often an expert is used never or always

    def side() -> tuple[list[list[int]], int]:
        tokens = int(random.integers(1, largest + 1))
        used = random.integers(0, tokens + 1, (LAYERS, EXPERTS))
        ends = random.choice([0, tokens], used.shape)
        return np.where(random.random(used.shape) < extreme, ends, used).tolist(), tokens

    return [Cluster(*side(), *side()) for _ in range(draw(st.integers(least, most)))]


def summed(clusters: list[Cluster], dtype: type = np.int64) -> ClusterSums:
    sums = ClusterSums.zeros(LAYERS, EXPERTS, dtype)
    for one in clusters:
        sums.add(np.array(one.a1, dtype), one.n1, np.array(one.a2, dtype), one.n2)
    return sums


def obvious(
    clusters: list[Cluster], layer: int, expert: int
) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """p of either side, Δ and se² of one expert, as the formulas read, in fractions."""
    groups = len(clusters)
    tokens = [sum(one.n1 for one in clusters), sum(one.n2 for one in clusters)]
    p1 = Fraction(sum(one.a1[layer][expert] for one in clusters), tokens[0])
    p2 = Fraction(sum(one.a2[layer][expert] for one in clusters), tokens[1])
    squares = Fraction(0)
    for one in clusters:
        influence = (one.a1[layer][expert] - p1 * one.n1) / tokens[0]
        influence -= (one.a2[layer][expert] - p2 * one.n2) / tokens[1]
        squares += influence**2
    variance = squares * groups / (groups - 1) if groups > 1 else Fraction(0)
    return p1, p2, p1 - p2, variance


def places() -> list[tuple[int, int]]:
    return [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


# Against fractions ------------------------------------------------------------------------------------------


@given(experiment())
def test_rates_differences_and_errors_are_those_of_the_formulas(clusters: list[Cluster]) -> None:
    sums = summed(clusters)
    for layer, expert in places():
        p1, p2, delta, variance = obvious(clusters, layer, expert)
        assert rd.rates(sums)[0, layer, expert] == float(p1)  # one rounding: the nearest float, exactly
        assert rd.rates(sums)[1, layer, expert] == float(p2)
        assert rd.risk_difference(sums)[layer, expert] == float(delta)
        assert rd.standard_error(sums)[layer, expert] == pytest.approx(math.sqrt(variance), rel=1e-14, abs=0)


@given(experiment(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_intervals_and_p_values_are_students_with_clusters_less_one(
    clusters: list[Cluster], level: float
) -> None:
    sums = summed(clusters)
    low, high = rd.interval(sums, level)
    p_values = rd.p_values(sums)
    student = stats.t(len(clusters) - 1)
    for layer, expert in places():
        _, _, delta, variance = obvious(clusters, layer, expert)
        reach = student.isf((1 - level) / 2) * math.sqrt(variance)
        assert low[layer, expert] == pytest.approx(float(delta) - reach, rel=1e-12, abs=1e-15)
        assert high[layer, expert] == pytest.approx(float(delta) + reach, rel=1e-12, abs=1e-15)
        if variance:
            expected = 2 * student.sf(abs(float(delta)) / math.sqrt(variance))
            assert p_values[layer, expert] == pytest.approx(expected, rel=1e-9)


def test_a_cluster_is_a_unit_whatever_it_is_cut_into() -> None:
    """Pairs of a group put in one by one would seem independent: the error must be that of the group."""
    random = np.random.default_rng(5)
    counts = random.integers(0, 11, (20, 2))
    grouped, copied = ClusterSums.zeros(1, 1), ClusterSums.zeros(1, 1)
    for one, two in counts:
        grouped.add(np.full((1, 1), 4 * one), 40, np.full((1, 1), 4 * two), 40)
        for _ in range(4):  # the same tokens as four clusters that say the same
            copied.add(np.full((1, 1), one), 10, np.full((1, 1), two), 10)
    assert rd.risk_difference(grouped) == rd.risk_difference(copied)
    ratio = (rd.standard_error(grouped) / rd.standard_error(copied)).item()
    assert ratio == pytest.approx(math.sqrt(4 * (20 / 19) / (80 / 79)), rel=1e-12)


def test_equal_sides_have_no_difference_and_no_error() -> None:
    """A pair whose sides behave alike says nothing about Δ, however its rate varies: ψ cancels."""
    sums = ClusterSums.zeros(1, 1)
    for a, n in zip(range(25), range(30, 55), strict=True):
        sums.add(np.full((1, 1), a), n, np.full((1, 1), a), n)
    assert rd.risk_difference(sums).item() == 0
    assert rd.standard_error(sums).item() == 0
    assert rd.p_values(sums).item() == 1
    assert [bound.item() for bound in rd.interval(sums)] == [0, 0]


def test_never_used_and_always_used_experts() -> None:
    sums = ClusterSums.zeros(1, 3)
    for n in range(5, 30):
        sums.add(np.array([[0, n, n]]), n, np.array([[0, n, 0]]), n)
    assert rd.risk_difference(sums).tolist() == [[0, 0, 1]]
    assert rd.standard_error(sums).tolist() == [[0, 0, 0]]
    assert rd.p_values(sums).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("groups", [0, 1, 2, 19])
def test_below_twenty_clusters_there_is_a_difference_but_no_error(groups: int) -> None:
    sums = ClusterSums.zeros(1, 2)
    for n in range(1, groups + 1):
        sums.add(np.array([[n, 0]]), n + 1, np.array([[0, 0]]), n)
    nothing = [rd.standard_error(sums), *rd.interval(sums), rd.p_values(sums), q_values(rd.p_values(sums))]
    assert all(np.isnan(array).all() and array.shape == (1, 2) for array in nothing)
    assert np.isnan(rd.risk_difference(sums)).all() == (groups == 0)


def test_from_twenty_clusters_there_is_an_error() -> None:
    sums = summed([Cluster([[1, 2, 3]] * 2, 4, [[3, 0, 1]] * 2, 5 + i) for i in range(20)])
    assert np.isfinite(rd.standard_error(sums)).all()
    assert np.isfinite(rd.p_values(sums)).all()


# q ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 5))
def test_q_values_are_benjamini_hochbergs(p: list[float], missing: int) -> None:
    table = np.array([p + [math.nan] * missing])
    q = q_values(table)
    assert np.isnan(q[0, len(p) :]).all()
    np.testing.assert_allclose(q[0, : len(p)], fdrcorrection(p)[1], rtol=1e-12, atol=1e-300)


def test_experts_that_a_layer_lacks_do_not_count_as_tests() -> None:
    p = np.array([[0.01, 0.02, 0.03, 1.0], [0.04, 0.5, 1.0, 1.0]])
    valid = np.array([[True] * 4, [True, True, False, False]])
    q = q_values(p, valid)
    assert np.isnan(q[~valid]).all()
    np.testing.assert_allclose(q[valid], fdrcorrection(p[valid])[1], rtol=1e-12)


# Sums -------------------------------------------------------------------------------------------------------

shard = experiment(least=0, most=5)


@given(shard, shard, shard)
def test_adding_shards_is_associative_commutative_and_one_run(
    first: list[Cluster], second: list[Cluster], third: list[Cluster]
) -> None:
    one, two, three = map(summed, (first, second, third))
    together = summed([*first, *second, *third])
    assert (one + two) + three == together
    assert one + (two + three) == together
    assert three + one + two == together
    for field in fields(ClusterSums):
        assert type(getattr(one + two, field.name)) is type(getattr(together, field.name))


def test_adding_leaves_the_shards_as_they_were() -> None:
    one, two = (summed([Cluster([[i] * 3] * 2, 4, [[1] * 3] * 2, 5)]) for i in (1, 2))
    copy = summed([Cluster([[1] * 3] * 2, 4, [[1] * 3] * 2, 5)])
    _ = one + two
    assert one == copy


@given(experiment(largest=10**10), st.integers(1, 19))
def test_counts_of_any_size_stay_exact(clusters: list[Cluster], cut: int) -> None:
    """10^10 tokens in a cluster: their squares leave 64 bits at once."""
    sums = summed(clusters)
    merged = summed(clusters[:cut]) + summed(clusters[cut:])
    assert sums == merged
    for field in fields(ClusterSums):
        one_run, of_shards = getattr(sums, field.name), getattr(merged, field.name)
        assert getattr(one_run, "dtype", None) == getattr(of_shards, "dtype", None)
    for layer, expert in places():
        a1, a2 = ([getattr(c, side)[layer][expert] for c in clusters] for side in ("a1", "a2"))
        n1, n2 = [c.n1 for c in clusters], [c.n2 for c in clusters]
        for name, left, right in [
            ("a1a1", a1, a1), ("a1a2", a1, a2), ("a2a2", a2, a2),
            ("a1n1", a1, n1), ("a1n2", a1, n2), ("a2n1", a2, n1), ("a2n2", a2, n2),
        ]:  # fmt: skip
            exact = sum(x * y for x, y in zip(left, right, strict=True))
            assert int(getattr(sums, name)[layer, expert]) == exact
        _, _, delta, variance = obvious(clusters, layer, expert)
        assert rd.risk_difference(sums)[layer, expert] == float(delta)
        assert rd.standard_error(sums)[layer, expert] == pytest.approx(math.sqrt(variance), rel=1e-14, abs=0)


def test_a_thousand_clusters_of_a_billion_tokens() -> None:
    sums = ClusterSums.zeros(1, 2)
    for i in range(1000):
        sums.add(np.array([[900_000_000 + i, 10**9]]), 10**9, np.array([[100_000_000, 10**9]]), 10**9)
    assert int(sums.a1a1[0, 1]) == 1000 * 10**18
    assert int(sums.a1n2[0, 1]) == 1000 * 10**18
    assert rd.risk_difference(sums)[0, 0] == float(Fraction(sum(range(1000)), 10**12) + Fraction(4, 5))
    spread = sum((Fraction(i) - Fraction(999, 2)) ** 2 for i in range(1000))
    variance = spread / Fraction(10**12) ** 2 * 1000 / 999
    assert rd.standard_error(sums)[0, 0] == pytest.approx(math.sqrt(variance), rel=1e-14)
    assert rd.standard_error(sums)[0, 1] == 0


def test_the_last_cluster_that_fits_and_the_first_that_does_not() -> None:
    largest = math.isqrt(2**63 - 1)
    sums = ClusterSums.zeros(1, 1)
    sums.add(np.full((1, 1), largest), largest, np.full((1, 1), 1), 1)
    assert int(sums.a1a1[0, 0]) == largest**2
    sums.add(np.full((1, 1), largest), largest, np.full((1, 1), 1), 1)
    assert int(sums.a1a1[0, 0]) == 2 * largest**2


# Coverage ---------------------------------------------------------------------------------------------------

PAIRS = 4
UNIT = 2**20
RATES = [
    (0.1, 0.1),
    (0.1, 0.3),
    (0.3, 0.1),
    (0.3, 0.5),
    (0.5, 0.5),
    (0.7, 0.5),
    (0.9, 0.7),
    (0.8, 0.9),
    (0.9, 0.9),
]


def correlated_rates(
    random: np.random.Generator, shape: tuple[int, ...], rho: float, shared: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rates of either side, [*shape, len(RATES)]: each beta distributed about its mean with intra-cluster
    correlation `rho`. A beta variable is the share of one gamma variable in the sum of two; the sides have
    parts of both in common.
    """
    p = np.array(RATES).T
    size = (1 - rho) / rho
    inside, outside = size * p, size * (1 - p)  # [2, rates]: the two shapes of each side's beta
    draw = lambda shapes: random.gamma(np.broadcast_to(shapes, (*shape, len(RATES))))  # noqa: E731
    common_in, common_out = draw(shared * inside.min(0)), draw(shared * outside.min(0))
    rates = []
    for side in (0, 1):
        used = common_in + draw(inside[side] - shared * inside.min(0))
        unused = common_out + draw(outside[side] - shared * outside.min(0))
        rates.append(used / (used + unused))
    return rates[0], rates[1]


def coverage(
    clusters: int, *, rho: float, shared: float = 0.5, weighting: str = "token", experiments: int = 10_000
) -> np.ndarray:
    """Share of experiments whose 95% interval holds the true Δ, for each of `RATES`.

    A cluster has 1 to 4 pairs of 3 to 40 tokens a side; all its tokens of a side have one rate, drawn as in
    `correlated_rates`. The experts of an experiment share its tokens, as in a model; each experiment draws
    lengths, rates and tokens anew.
    """
    random = np.random.default_rng(0)
    truth = np.array([p1 - p2 for p1, p2 in RATES])
    present = np.arange(PAIRS) < random.integers(1, PAIRS + 1, (experiments, clusters, 1))
    lengths = random.integers(3, 41, (2, experiments, clusters, PAIRS)) * present
    rates = correlated_rates(random, (experiments, clusters), rho, shared)
    used = [random.binomial(lengths[side][..., None], rates[side][:, :, None, :]) for side in (0, 1)]
    if weighting == "pair":
        used = [used[side] * UNIT // np.maximum(lengths[side], 1)[..., None] for side in (0, 1)]
        lengths = np.broadcast_to(present * UNIT, lengths.shape)
    a, n = [side.sum(axis=2) for side in used], lengths.sum(axis=3)
    held = np.zeros(len(RATES))
    for i in range(experiments):
        low, high = rd.interval(sums_of(a[0][i], n[0, i], a[1][i], n[1, i]))
        held += (low[0] <= truth) & (truth <= high[0])
    return held / experiments


def sums_of(a1: np.ndarray, n1: np.ndarray, a2: np.ndarray, n2: np.ndarray) -> ClusterSums:
    """What adding clusters one by one gives, at once: a [clusters, experts], n [clusters]."""
    return ClusterSums(
        *(table.sum(0)[None] for table in (a1, a2, a1 * a1, a1 * a2, a2 * a2)),
        *((a * n[:, None]).sum(0)[None] for a, n in ((a1, n1), (a1, n2), (a2, n1), (a2, n2))),
        *(int(total) for total in (n1.sum(), n2.sum(), n1 @ n1, n1 @ n2, n2 @ n2)),
        clusters=len(n1),
    )


def test_sums_at_once_are_those_one_by_one() -> None:
    random = np.random.default_rng(2)
    n1, n2 = random.integers(1, 50, (2, 30))
    a1, a2 = random.integers(0, n1[:, None] + 1, (30, 4)), random.integers(0, n2[:, None] + 1, (30, 4))
    one_by_one = ClusterSums.zeros(1, 4)
    for i in range(30):
        one_by_one.add(a1[i][None], int(n1[i]), a2[i][None], int(n2[i]))
    assert sums_of(a1, n1, a2, n2) == one_by_one


def test_the_simulated_clusters_are_clustered_and_their_sides_correlated() -> None:
    """What the coverage below rests on: means, intra-cluster correlation and correlation of the sides."""
    rates = correlated_rates(np.random.default_rng(1), (200_000,), 0.1, 0.5)
    for side in (0, 1):
        mean = np.array(RATES).T[side]
        np.testing.assert_allclose(rates[side].mean(0), mean, atol=0.005)
        np.testing.assert_allclose(rates[side].var(0), 0.1 * mean * (1 - mean), rtol=0.03)
    between = [np.corrcoef(rates[0][:, i], rates[1][:, i])[0, 1] for i in range(len(RATES))]
    assert min(between) > 0.25


def test_intervals_hold_the_truth_in_93_to_97_percent_of_experiments() -> None:
    """Five times the experiments that the design asks for: chance moves a share by ±.5 points, not 1."""
    held = coverage(30, rho=0.1)
    assert ((held >= 0.93) & (held <= 0.97)).all(), dict(zip(RATES, held, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("clusters", "rho", "shared", "weighting"),
    [
        (30, 0.3, 0.5, "token"),
        (30, 0.1, 0.0, "token"),
        (30, 0.1, 0.9, "token"),
        (30, 0.1, 0.5, "pair"),
        (60, 0.1, 0.5, "token"),
        (60, 0.3, 0.5, "pair"),
        (120, 0.1, 0.5, "token"),
    ],
)
def test_intervals_hold_the_truth_under_other_designs(
    clusters: int, rho: float, shared: float, weighting: str
) -> None:
    held = coverage(clusters, rho=rho, shared=shared, weighting=weighting)
    assert ((held >= 0.93) & (held <= 0.97)).all(), dict(zip(RATES, held, strict=True))
