"""Histograms of norms: their medians against exact ones, and merging."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.concepts.norms import NormHistogram

NORMS = st.lists(st.floats(1e-6, 1e10), min_size=1, max_size=60)


def histogram(norms: list[float]) -> NormHistogram:
    made = NormHistogram()
    made.add(torch.tensor(norms, dtype=torch.float64))
    return made


@given(NORMS)
def test_median_is_within_its_precision(norms: list[float]) -> None:
    exact = sorted(norms)[(len(norms) - 1) // 2]
    assert abs(histogram(norms).median / exact - 1) <= 0.003


@given(NORMS, NORMS)
def test_parts_merge_into_the_whole(one: list[float], other: list[float]) -> None:
    whole = histogram(one + other)
    assert histogram(one) + histogram(other) == whole
    assert NormHistogram.from_tensor(whole.to_tensor()) == whole
    assert whole.count == len(one) + len(other)


def test_empty_and_outer() -> None:
    assert math.isnan(NormHistogram().median)
    assert histogram([0.0]).median < 1e-7
    assert histogram([1e30]).median > 1e11


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        histogram([math.inf])
    with pytest.raises(ValueError, match="int64 counts"):
        NormHistogram(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 0"):
        NormHistogram(torch.full((8192,), -1))


def test_more_than_there_can_be_is_refused() -> None:
    counts = NormHistogram().to_tensor()
    counts[:3] = 2**62  # whose sum is beyond int64
    with pytest.raises(ValueError, match="more than there can be"):
        NormHistogram.from_tensor(counts)
