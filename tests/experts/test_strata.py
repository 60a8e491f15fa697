"""Mantel-Haenszel differences against exact fractions and a slow linearisation; sums that merge exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.experts import risk_difference as rd
from steersman.experts import strata
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.strata import POSITION_STRATA, StratumSums

LAYERS, EXPERTS = 2, 3


def made(clusters: int, starts: tuple[int, ...], seed: int, most: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Clusters with tokens in some of the columns only; one expert always used, one never."""
    random = np.random.default_rng(seed)
    n = random.integers(0, most, (clusters, 2 * len(starts)))
    n[:, 0] = np.maximum(n[:, 0], 1)
    n[:, len(starts)] = np.maximum(n[:, len(starts)], 1)
    rates = random.random((2 * len(starts), LAYERS, EXPERTS))
    a = random.binomial(n[:, :, None, None], rates[None])
    a[:, :, 0, 0], a[:, :, 0, 1] = n, 0
    return a.astype(np.int64), n.astype(np.int64)


def summed(a: np.ndarray, n: np.ndarray, starts: tuple[int, ...]) -> StratumSums:
    sums = StratumSums.zeros(LAYERS, EXPERTS, starts)
    sums.add(a, n)
    return sums


def obvious(a: np.ndarray, n: np.ndarray, layer: int, expert: int) -> tuple[Fraction, Fraction]:
    """Δ and se² by loops over strata and clusters, in fractions, as the module's formulas are written."""
    strata_ = n.shape[1] // 2
    totals = [[sum(int(v) for v in n[:, s * strata_ + t]) for t in range(strata_)] for s in (0, 1)]
    uses = [
        [sum(int(v) for v in a[:, s * strata_ + t, layer, expert]) for t in range(strata_)] for s in (0, 1)
    ]
    top, weight = Fraction(0), Fraction(0)
    for t in range(strata_):
        one, two = totals[0][t], totals[1][t]
        if one and two:  # a stratum of one side alone says nothing
            w = Fraction(one * two, one + two)
            top += w * (Fraction(uses[0][t], one) - Fraction(uses[1][t], two))
            weight += w
    delta = top / weight
    squares = Fraction(0)
    for i in range(len(n)):
        influence = Fraction(0)
        for t in range(strata_):
            one, two = totals[0][t], totals[1][t]
            if one + two == 0:
                continue
            a1, a2 = int(a[i, t, layer, expert]), int(a[i, strata_ + t, layer, expert])
            n1, n2 = int(n[i, t]), int(n[i, strata_ + t])
            both = uses[0][t] + uses[1][t]
            r = Fraction(two * a1 - one * a2, one + two)
            r += Fraction(both * (one * n2 - two * n1), (one + two) ** 2)
            influence += r - delta * Fraction(two**2 * n1 + one**2 * n2, (one + two) ** 2)
        squares += (influence / weight) ** 2
    return delta, squares * len(n) / (len(n) - 1)


@pytest.mark.parametrize("starts", [(0,), (0, 2), POSITION_STRATA])
def test_differences_and_errors_are_those_of_the_formulas(starts: tuple[int, ...]) -> None:
    a, n = made(25, starts, seed=len(starts))
    n[:, -1] = 0  # a stratum that the negative side does not reach
    a[:, -1] = 0
    found = strata.estimate(summed(a, n, starts)) if len(starts) > 1 else None
    if found is None:
        a, n = made(25, starts, seed=1)
        found = strata.estimate(summed(a, n, starts))
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            delta, variance = obvious(a, n, layer, expert)
            assert found.difference[layer, expert] == float(delta)
            assert found.standard_error[layer, expert] == pytest.approx(float(variance) ** 0.5, rel=1e-12)
    assert found.difference[0, 0] == found.standard_error[0, 0] == 0
    assert found.p_values()[0, 0] == 1


def test_the_influence_is_that_of_leaving_clusters_out() -> None:
    """The linearisation against numerical derivatives: weigh a cluster a little more and look."""
    starts = (0, 1, 4)
    a, n = made(30, starts, seed=5, most=40)
    h = 1e-6
    influences = []
    for i in range(len(n)):
        weights = np.ones(len(n))
        weights[i] += h
        up = strata.differences(np.tensordot(weights, a, 1)[None], (weights @ n)[None])[0]
        weights[i] -= 2 * h
        down = strata.differences(np.tensordot(weights, a, 1)[None], (weights @ n)[None])[0]
        influences.append((up - down) / (2 * h))
    expected = np.sqrt(len(n) / (len(n) - 1) * np.square(influences).sum(axis=0))
    np.testing.assert_allclose(
        strata.estimate(summed(a, n, starts)).standard_error, expected, rtol=1e-5, atol=1e-9
    )


@given(st.integers(20, 26), st.integers(0, 99))
def test_one_stratum_is_the_plain_risk_difference(clusters: int, seed: int) -> None:
    a, n = made(clusters, (0,), seed)
    plain = ClusterSums.zeros(LAYERS, EXPERTS)
    plain.add_clusters(a, n)
    found = strata.estimate(summed(a, n, (0,)))
    np.testing.assert_array_equal(found.difference, rd.risk_difference(plain))
    np.testing.assert_array_equal(found.standard_error, rd.standard_error(plain))


@given(st.integers(0, 99), st.lists(st.integers(1, 29), max_size=4), st.sampled_from([1, 10**9]))
def test_sums_of_parts_are_the_sums_of_the_whole(seed: int, cuts: list[int], scale: int) -> None:
    a, n = made(30, (0, 1, 3), seed)
    a, n = a * scale, n * scale
    whole, parts, together = summed(a, n, (0, 1, 3)), [], StratumSums.zeros(LAYERS, EXPERTS, (0, 1, 3))
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        if start < end:
            parts.append(summed(a[start:end], n[start:end], (0, 1, 3)))
            together.add(a[start:end], n[start:end])
    merged = sum(parts[1:], start=parts[0])
    assert merged == whole == together
    assert merged.a.dtype == whole.a.dtype == together.a.dtype == (object if scale > 1 else np.int64)
    found, expected = strata.estimate(merged), strata.estimate(whole)
    np.testing.assert_array_equal(found.difference, expected.difference)
    np.testing.assert_array_equal(found.standard_error, expected.standard_error)


def test_another_length_is_not_another_routing() -> None:
    """Experts that follow the position alone: Δ is large where lengths differ, and 0 within strata."""
    rates = np.array([0.9, 0.1])  # at the first position, and later
    n = np.tile([10, 10, 10, 90], (25, 1))
    a = (n.reshape(25, 2, 2) * rates).round().astype(np.int64).reshape(25, 4)[:, :, None, None]
    sums = StratumSums.zeros(1, 1, (0, 1))
    sums.add(a, n)
    plain = a[:, :2].sum() / n[:, :2].sum() - a[:, 2:].sum() / n[:, 2:].sum()
    assert plain > 0.3
    assert strata.estimate(sums).difference[0, 0] == 0


def test_many_at_once_are_each_of_them() -> None:
    starts = (0, 1, 4)
    several = [made(22, starts, seed) for seed in range(4)]
    a, n = (np.stack([one[place].sum(axis=0) for one in several]) for place in (0, 1))
    found = strata.differences(a, n)
    for row, (x, y) in enumerate(several):
        np.testing.assert_allclose(found[row], strata.estimate(summed(x, y, starts)).difference, atol=1e-15)
    assert np.isnan(strata.differences(a * 0, n * 0)).all()


def test_positions_fall_into_strata() -> None:
    positions = [0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 10**6]
    assert strata.stratum_of(np.array(positions)).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_no_stratum_of_both_sides_has_no_difference() -> None:
    sums = StratumSums.zeros(1, 1, (0, 1))
    sums.add(np.ones((25, 4, 1, 1), np.int64), np.tile([1, 0, 0, 1], (25, 1)))
    found = strata.estimate(sums)
    assert np.isnan(found.difference).all()
    assert np.isnan(found.standard_error).all()
