"""The gate's statistic against refits by loops; how often noise passes, and a concept does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.concepts.relabelling import DRAWS, arrivals, labellings, products, spread

FOLDS = 5


def folds_of(units: int) -> np.ndarray:
    return np.arange(units) % min(FOLDS, units)


def k_of(source: np.ndarray, target: np.ndarray, weight: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return products(target @ weight @ source.T, folds_of(len(source)), int(sizes.sum()), sizes)


def refitted(
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    sizes: np.ndarray,
    s: np.ndarray,
    t: np.ndarray,
) -> float:
    """The mean held-out projection by loops: labels s at the source, t at the target."""
    folds, total = folds_of(len(source)), 0.0
    for fold in set(folds.tolist()):
        others = [u for u in range(len(source)) if folds[u] != fold]
        vector = sum(s[u] * source[u] for u in others) / sum(sizes[u] for u in others)
        total += sum(t[u] * target[u] @ (weight @ vector) for u in range(len(source)) if folds[u] == fold)
    return float(total / sizes.sum())


@given(st.integers(0, 10_000), st.integers(2, 13))
@settings(max_examples=30)
def test_a_quadratic_form_is_every_refit(seed: int, units: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 4, units)
    source, target = draw.normal(size=(units, 3)), draw.normal(size=(units, 4))
    weight = draw.normal(size=(4, 3))
    k = k_of(source, target, weight, sizes)
    s, t = draw.choice([-1.0, 1.0], (2, units))
    assert t @ k @ s == pytest.approx(refitted(source, target, weight, sizes, s, t))
    ones = np.ones(units)
    (found,) = arrivals([k], labellings(units, 50))
    assert found.carried == pytest.approx(refitted(source, target, weight, sizes, ones, ones))
    every = 1.0 - 2.0 * ((np.arange(2**units)[:, None] >> np.arange(units)) & 1)
    by_hand = np.array([flip @ k @ flip for flip in every])
    assert by_hand.mean() == pytest.approx(0, abs=1e-9 * (1 + abs(by_hand).max()))
    assert by_hand.std() == pytest.approx(spread(k))


def test_labellings_begin_with_the_labels_as_they_are_and_are_all_where_there_are_few() -> None:
    few, many = labellings(6), labellings(40)
    assert (few[0] == 1).all()
    assert (many[0] == 1).all()
    assert len({tuple(row) for row in few}) == len({tuple(max(row, -row, key=tuple)) for row in few}) == 32
    assert many.shape == (1 + DRAWS, 40)
    assert np.array_equal(many, labellings(40))
    # Fewer than six groups: however large the effect, one of sixteen labellings is the true one.
    for units, passes in ((5, False), (6, True)):
        same = np.ones((units, 1))
        k = k_of(same, same, np.ones((1, 1)), np.ones(units, np.int64))
        assert (arrivals([k], labellings(units))[0].p <= 0.05) == passes


def test_nothing_arrives_of_nothing_and_rounding_decides_nothing() -> None:
    zero = np.zeros((8, 8))
    assert arrivals([zero], labellings(8))[0].p == 1.0
    k = np.random.default_rng(0).normal(size=(8, 8)) * (folds_of(8)[:, None] != folds_of(8))
    noise = 1 + 1e-14 * np.random.default_rng(1).normal(size=(8, 8))
    assert arrivals([k], labellings(8))[0].p == arrivals([k * noise], labellings(8))[0].p


# How often it errs ------------------------------------------------------------------------------------------

UNITS, WIDTH, LAYERS, NULLS, MOST = 24, 12, 4, 200, 15
"""Of 200 nulls at most 15 pass: more than 15 would, of a test that errs in 5 of 100, in 5 of 100 runs."""


def passing(kind: str, effect: float = 0.0, runs: int = NULLS) -> int:
    """How often the gate passes at a layer, of simulated models: both have the concept where `kind` says so,
    along fixed directions, beside noise that layers share in part.
    """
    draw = np.random.default_rng(sum(map(ord, kind)))
    signs, sizes, passed = labellings(UNITS, 199), np.ones(UNITS, np.int64), 0
    for _ in range(runs):
        at_source = effect if kind in ("both", "source") else 0.0
        at_target = effect if kind in ("both", "target") else 0.0
        along = draw.normal(size=WIDTH) / WIDTH**0.5
        shared = draw.normal(size=(2, UNITS, WIDTH))
        flips = draw.choice([-1.0, 1.0], (UNITS, 1)) if kind == "flipped" else 1.0
        layers = []
        for _ in range(LAYERS):
            source, target = (shared + draw.normal(size=shared.shape)) / 2**0.5
            if kind == "flipped":  # what is there, with labels that mean nothing
                source, target = flips * (source + 2 * along), flips * (target + 2 * along)
            # What the pairs are beside the concept is the same in both models.
            target = 0.5 * source + target
            layers.append(k_of(source + at_source * along, target + at_target * along, np.eye(WIDTH), sizes))
        passed += min(found.p for found in arrivals(layers, signs)) <= 0.05
    return passed


@pytest.mark.parametrize("kind", ["neither", "source", "target", "flipped"])
def test_of_200_nulls_at_most_15_pass(kind: str) -> None:
    assert passing(kind, effect=3.0) <= MOST


def test_a_concept_that_both_have_passes() -> None:
    assert passing("both", effect=3.0, runs=50) >= 48
    assert 10 <= passing("both", effect=0.8, runs=50) <= 49
