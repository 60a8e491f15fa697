"""Exact sums of products against Python's own integers, of every size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.experts import moments

SIZES = st.sampled_from([3, 1 << 20, 1 << 31, 1 << 40, 1 << 53, 1 << 62, (1 << 63) - 1])


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows = draw(st.integers(1, 5))
    sides = []
    for _ in range(2):
        number = st.integers(0, draw(SIZES))
        sides.append(np.array([[draw(number) for _ in range(3)] for _ in range(rows)], np.int64))
    return sides[0], sides[1]


@given(tables())
def test_sums_of_products_are_exact(given_: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = given_
    expected = [sum(int(a) * int(b) for a, b in zip(x[:, i], y[:, i], strict=True)) for i in range(3)]
    assert moments.product_sum(x, y).tolist() == expected


def test_more_rows_than_limbs_hold_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_MOST_ROWS", 3)
    x = np.full((10, 2), (1 << 63) - 1)
    assert moments.product_sum(x, x).tolist() == [10 * ((1 << 63) - 1) ** 2] * 2


def test_rows_broadcast() -> None:
    x, n = np.arange(24).reshape(4, 2, 3), np.array([1, 1 << 60, 2, 1 << 61])
    expected = sum(x[i].astype(object) * int(n[i]) for i in range(4))
    assert moments.product_sum(x, n[:, None, None]).tolist() == expected.tolist()


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3), SIZES)
def test_weighted_sums_are_exact_or_refused(weights: list[list[int]], size: int) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, size, (4, 2, 3), endpoint=True)
    w = np.array(weights)
    try:
        found = moments.weighted_sum(w, x)
    except OverflowError:
        assert max(map(sum, weights)) * int(x.max()) >= 1 << 63
        return
    expected = [sum(x[i].astype(object) * row[i] for i in range(4)).tolist() for row in weights]
    assert found.dtype == np.int64
    assert found.tolist() == expected
