"""Directions in the states of pairs: of all of them, of all but a fold, and of shuffled labels. Pure maths.

Kept is a sum of differences for each *unit* (`relabelling`): groups of pairs, at most a hundred.

States come in chunks, in as many passes as asked for: nothing here grows with the number of pairs but a few
numbers a pair. δ_i = h_i(positive) − h_i(negative).

`mean_difference` is m = Σ δ_i / n (ConTrans, arXiv 2405.13578). `pca` is u (u·m) with u the top direction of
the pair differences, the first eigenvector of Σ δ_i δ_iᵀ (RepE, arXiv 2310.01405): oriented along, and as
long as, the projection of the mean difference. `pca_diff` is the same with the first eigenvector of
Σ (δ_i − m)(δ_i − m)ᵀ, along which the differences *vary* most. repeng (github.com/vgel/repeng, extract.py, by
scikit-learn's PCA, which takes the mean off) calls the first `pca_center`, the second `pca_diff`; both have
length 1 there, and the sign for which most positive sides are larger.

Shuffled labels: Σ (s_i − s̄) δ_i / n, s_i = −1 in a random half of the units, else 1. Taking the mean s̄ off
the signs leaves exactly nothing of the mean difference also where halves are uneven: what remains is the
noise that a concept of these pairs has. It is the same for `pca`, whose u does not change when sides are
swapped, so that swapping alone would leave the concept in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

from steersman.concepts.relabelling import UNITS

Floats = NDArray[np.floating]
Pass = Callable[[], Iterable[tuple[slice, Floats]]]
"""One pass through all pairs: (which, their states [pairs, 2, width]; 0 positive, 1 negative)."""

FOLDS = 5
SHUFFLES = 99
"""Concepts of shuffled labels: the 95th of a hundred is told."""
_TOLERANCE = 1e-7
"""Relative, of the eigenvalue."""
_ROUNDING = 1e-24
"""Of squared moments: below it differences vary by rounding alone."""


@dataclass(frozen=True)
class Directions:
    """Float64: the directions of all pairs [width] and of all pairs but each fold's [folds, width], and the
    sum of the differences of each unit's pairs [units, width].
    """

    whole: NDArray[np.float64]
    of_folds: NDArray[np.float64]
    unit_sums: NDArray[np.float64]


def fold_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pair's fold, by the number of its cluster in the order of appearance: round robin over five folds,
    or as many as there are clusters. Fewer than two clusters have none: −1.
    """
    clusters = int(numbers.max()) + 1
    return numbers % min(FOLDS, clusters) if clusters > 1 else np.full_like(numbers, -1)


def unit_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pair's unit, by the number of its cluster: round robin, so that a unit lies in one fold."""
    return numbers % UNITS


def mean_differences(states: Pass, numbers: NDArray[np.int64]) -> Directions:
    """Mean differences in one pass.

    Args:
        states: The states.
        numbers: Each pair's cluster number, [pairs].
    """
    units = unit_of(numbers)
    sums = unit_sums(states, units)
    sizes = np.bincount(units)
    folds = fold_of(np.arange(len(sums)))
    left = folds != np.arange(int(folds.max()) + 1)[:, None]
    return Directions(
        whole=sums.sum(0) / len(numbers), of_folds=left @ sums / (left @ sizes)[:, None], unit_sums=sums
    )


def unit_sums(states: Pass, units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Σ δ over the pairs of each unit, [units, width], in one pass; pairs of unit −1 are left out."""
    names, sums = np.arange(int(units.max()) + 1), 0.0
    for pairs, chunk in states():
        sums = sums + (units[pairs] == names[:, None]).astype(np.float64) @ _differences(chunk)
    return np.asarray(sums)


def shuffled_directions(
    sums: NDArray[np.floating], sizes: NDArray[np.int64], draws: int = SHUFFLES, seed: int = 0
) -> NDArray[np.float64]:
    """Directions of shuffled labels, [draws, …].

    Args:
        sums: Of each unit's differences, [units, …].
        sizes: Pairs of each unit, [units].
    """
    generator, units = np.random.default_rng(seed), len(sums)
    signs = np.ones((draws, units))
    for draw in signs:
        draw[generator.permutation(units)[: units // 2]] = -1
    signs -= (signs @ sizes / sizes.sum())[:, None]
    drawn: NDArray[np.float64] = np.tensordot(signs, sums, axes=1) / sizes.sum()
    return drawn


def principal_directions(
    states: Pass, folds: NDArray[np.int64], means: Directions, *, centred: bool = False
) -> Directions:
    """Top directions of the pair differences, or of those less their mean, each in a few dozen passes.

    `means` are from `mean_differences`. Differences that do not vary have no direction: 0.
    """
    of_folds = [_principal(states, folds != fold, mean, centred) for fold, mean in enumerate(means.of_folds)]
    whole = _principal(states, np.ones(len(folds), np.bool_), means.whole, centred)
    return Directions(whole, np.array(of_folds).reshape(means.of_folds.shape), means.unit_sums)


def _principal(
    states: Pass, member: NDArray[np.bool_], mean: NDArray[np.float64], centred: bool
) -> NDArray[np.float64]:
    if not mean.any():
        return mean
    middle = mean if centred else np.zeros(len(mean))

    def times_moment(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        product = np.zeros(len(mean))
        for pairs, chunk in states():
            differences = _differences(chunk)[member[pairs]] - middle
            product += differences.T @ (differences @ vector.reshape(-1))
        return product

    if centred and not (times_moment(_start(len(mean))) ** 2).sum() > _ROUNDING * (mean @ mean) ** 2:
        return np.zeros(len(mean))
    if len(mean) == 1:
        return mean
    moment = LinearOperator((len(mean), len(mean)), matvec=times_moment, dtype=np.float64)
    _, vectors = eigsh(moment, k=1, which="LA", v0=_start(len(mean)) if centred else mean, tol=_TOLERANCE)
    top: NDArray[np.float64] = vectors[:, 0]
    return top * float(top @ mean)


def _start(width: int) -> NDArray[np.float64]:
    """A direction that no eigenvector is at right angles to, but by accident."""
    return np.random.default_rng(0).normal(size=width)


def held_out_scores(
    states: Pass, folds: NDArray[np.int64], directions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Each pair's two sides along the direction of its fold, [pairs, 2].

    Args:
        states: The states.
        folds: Each pair's row in `directions`, [pairs].
        directions: [folds, width].
    """
    scores = np.empty((len(folds), 2))
    for pairs, chunk in states():
        scores[pairs] = np.einsum("nsd,nd->ns", chunk.astype(np.float64), directions[folds[pairs]])
    return scores


def _differences(chunk: Floats) -> NDArray[np.float64]:
    return chunk[:, 0].astype(np.float64) - chunk[:, 1]
