"""Does a concept arrive, beyond what the same pairs with other labels would bring? Pure maths.

Units are groups of pairs. D_b is the sum of the pairs' differences of unit b at the source, E_a that of unit
a at the target, W the map. The concept of all pairs outside a's fold is v_a = Σ_b D_b / n_a, and what arrives
is the mean held-out projection T = Σ_a E_a · W v_a / n. Relabelled, the sides of whole units are swapped, s
and t ∈ {−1, 1}, and every fold's concept is refitted:

    T(t, s) = Σ_ab t_a s_b K_ab = t'Ks,   K_ab = E_a · W D_b / (n n_a), and 0 within a fold.

So a refit costs nothing. Where labels mean nothing, no labelling is special, and the share of those that
bring as much as the true one, itself counted, is an exact p-value. Labels may mean nothing in three ways, and
each has its own randomisation: in both models (s, s), in the target alone (s, 1), or in the source alone
(1, s). Joint swaps alone would not do: they make the source's concept small, and what it brings by chance
where the target has no such difference would look large. The largest of the three p-values counts.

Over all labellings T has mean 0, and a variance that is known: z = T / √var compares layers, and each layer
is judged by the largest z of all layers that are offered (Westfall and Young 1993), so that looking at many
does not help noise. (s, s) and (−s, −s) are the same: among u units there are 2^(u−1) labellings, and below
six units none can have p ≤ .05.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

UNITS = 100
"""Most units that groups of pairs are joined into: swapping coarser units is as exact, and an artifact with
a sum of differences for each stays small (100 × 80 layers × 8192 numbers are 262 MB, as 99 shuffled concepts
were). A multiple of the folds, so that a unit lies in one.
"""
FEWEST_UNITS = 6
"""Of fewer no labelling has p ≤ .05."""
DRAWS = 999
_ENUMERATED = 11
"""Up to so many units all labellings are gone through: 2^10 of them."""
_ROUNDING = 1e-9
"""Two z that differ by no more are equal: of these the relabelled one counts as reaching the other."""


@dataclass(frozen=True)
class Arrival:
    """What arrives at a layer: T of the true labels, its z among labellings of both models, and its p."""

    carried: float
    z: float
    p: float


def labellings(units: int, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Signs of units, [labellings, units], the labels as they are first: all that differ, or `draws` more."""
    if units <= _ENUMERATED:
        numbers = np.arange(2 ** max(units - 1, 0))[:, None]
        swapped = (numbers >> np.arange(units)) & 1  # the last unit keeps its labels: s and -s are the same
    else:
        swapped = np.random.default_rng(seed).integers(0, 2, (1 + draws, units))
        swapped[0] = 0
    signs: Floats = 1.0 - 2.0 * swapped.astype(np.float64)
    return signs


def arrivals(products: Sequence[Floats], signs: Floats) -> list[Arrival]:
    """What arrives at each layer.

    Args:
        products: K of each layer, [units, units].
        signs: From `labellings`.
    """
    both = [_standardised(((signs @ k) * signs).sum(1), spread(k)) for k in products]
    p = _reached(np.array(both))
    for axis in (1, 0):  # of the target, of the source
        sums = [k.sum(axis) for k in products]
        alone = [_standardised(signs @ each, float(np.linalg.norm(each))) for each in sums]
        p = np.maximum(p, _reached(np.array(alone)))
    return [
        Arrival(float(k.sum()), float(z[0]), float(reached))
        for k, z, reached in zip(products, both, p, strict=True)
    ]


def balanced(units: int, draws: int, seed: int = 0) -> Floats:
    """Signs of units, [1 + draws, units]: the labels as they are, then those with a random half swapped."""
    generator = np.random.default_rng(seed)
    signs = np.ones((1 + draws, units))
    for draw in signs[1:]:
        draw[generator.permutation(units)[: units // 2]] = -1
    return signs


def raised(changes: Floats, signs: Floats) -> Floats:
    """p of each layer that an effect on held-out units' own side is no larger than those of relabelled
    concepts: labels may mean nothing in the same three ways, and all layers are judged together.

    Args:
        changes: [layers, concepts, units], of d, labelled as it is; the first concept is the true one.
        signs: Of the concepts' labels, [concepts, units].
    """
    joint, source = (changes * signs).mean(-1), changes.mean(-1)
    target = changes[:, 0] @ labellings(signs.shape[1]).T / signs.shape[1]
    p = [_reached(np.array([_standardised(z, _size(z)) for z in each])) for each in (joint, source, target)]
    largest: Floats = np.max(p, axis=0)
    return largest


def _size(values: Floats) -> float:
    return float(np.sqrt((values**2).mean()))


def spread(products: Floats) -> float:
    """The standard deviation of s'Ks over all s: √(2 Σ A²), A = (K + K')/2, which is 0 within a fold."""
    return float(np.sqrt(2 * (((products + products.T) / 2) ** 2).sum()))


def _standardised(statistics: Floats, deviation: float) -> Floats:
    return statistics / deviation if deviation > 0 else 0.0 * statistics


def _reached(z: Floats) -> Floats:
    """The share of labellings, [layers], whose largest z reaches a layer's first; z [layers, n]."""
    least = z[:, :1] - _ROUNDING * (1 + np.abs(z[:, :1]))
    share: Floats = (z.max(axis=0) >= least).mean(axis=1)
    return share


def products(along: Floats, folds: NDArray[np.int64], pairs: int, sizes: NDArray[np.int64]) -> Floats:
    """K of one layer, [units, units].

    Args:
        along: E_a · W D_b, [units, units]; 0 for an a that the target was not asked about.
        folds: Of each unit, [units]; −1 for those that are not in the concept.
        pairs: n, how many the target was asked about.
        sizes: Pairs of each unit in the concept, [units].
    """
    apart = (folds[:, None] != folds[None]) & (folds[None] >= 0)
    left = apart @ sizes
    k: Floats = np.where(apart, along, 0.0) / (pairs * np.maximum(left, 1)[:, None])
    return k
