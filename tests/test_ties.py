"""What differs only by rounding is a tie: against loops, and where orders decide what a user gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.ties import COMPUTED, largest, ranks

LEVELS = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@given(LEVELS, st.randoms(use_true_random=False))
def test_noise_below_the_tolerance_is_not_seen(levels: list[int], random: object) -> None:
    """Equal numbers with noise have one rank, other numbers keep their order: as without noise."""
    noisy = [level + random.uniform(-3e-6, 3e-6) for level in levels]  # type: ignore[attr-defined]
    distinct = sorted(set(levels), reverse=True)
    assert ranks(noisy, absolute=1e-5).tolist() == [distinct.index(level) for level in levels]
    best = largest(range(len(levels)), noisy.__getitem__, absolute=1e-5)
    assert best == [place for place, level in enumerate(levels) if level == max(levels)]


@given(st.lists(st.floats(allow_infinity=True), min_size=1, max_size=12))
def test_ranks_never_go_against_the_values(values: list[float]) -> None:
    known = [-math.inf if math.isnan(value) else value for value in values]
    found = ranks(values).tolist()
    for one, other in zip(known, found, strict=True):
        for another, rank in zip(known, found, strict=True):
            assert other <= rank or one <= another
    assert found[known.index(max(known))] == 0
    assert known.index(max(known)) in largest(range(len(values)), values.__getitem__)


def test_a_chain_of_small_steps_is_one_tie_and_the_largest_is_no_chain() -> None:
    steps = [1.0 - 0.9e-5 * n for n in range(5)]
    assert ranks(steps).tolist() == [0] * 5
    assert largest(steps, float) == steps[:2]


def test_of_rows_each_has_its_own_ranks() -> None:
    rows = np.array([[1.0, 2.0, 2.0 + 1e-9], [np.nan, -np.inf, 0.0]])
    assert ranks(rows).tolist() == [[1, 0, 0], [1, 1, 0]]


def test_sums_of_decimals_are_equal_where_they_should_be() -> None:
    assert 0.3 - 0.1 != 0.2
    assert ranks([0.3 - 0.1, 0.2, 0.2 + 1e-9], COMPUTED).tolist() == [1, 1, 0]


@pytest.mark.parametrize("values", [[math.inf, math.inf], [-math.inf, -math.inf], [math.nan, math.nan]])
def test_what_has_no_size_is_a_tie(values: list[float]) -> None:
    assert ranks(values).tolist() == [0, 0]
    assert largest([0, 1], values.__getitem__) == [0, 1]
