"""Differences within positions of the target: a Mantel-Haenszel risk difference over strata, with errors that
respect clusters, as pure maths on exact integer sums.

Answers of different length, or with different openings, use experts differently whatever the behaviour. So
tokens are compared with tokens at like positions: for stratum t (a range of positions within the target),
side s and cluster i, a_sti of n_sti tokens used the expert. With A = Σa, N = Σn, N_t = N_1t + N_2t:

    R = Σ_t (A_1t N_2t - A_2t N_1t)/N_t    W = Σ_t N_1t N_2t/N_t    Δ = R/W

(S. Greenland and J. M. Robins, Biometrics 41 (1985), equation 1; a stratum that one side lacks weighs
nothing.) The error is that of `risk_difference`: linearised, with clusters as units. With T_t = A_1t + A_2t

    r_i = Σ_t [N_2t a_1ti - N_1t a_2ti]/N_t + T_t [N_1t n_2ti - N_2t n_1ti]/N_t²
    w_i = Σ_t [N_2t² n_1ti + N_1t² n_2ti]/N_t²
    ψ_i = (r_i - Δ w_i)/W        se² = G/(G - 1) Σψ_i²

With one stratum this is the plain risk difference and its error. Σψ² is a polynomial in the sums of all
products of a and n between strata: these are kept, as integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt

from steersman.experts.estimate import LEAST_CLUSTERS, Estimate, Floats, true_division
from steersman.experts.moments import INT64_MAX, Integers, as_limbs, from_limbs, product_sum

POSITION_STRATA = (0, 1, 2, 4, 8, 16, 32)
"""First position within the target of each stratum: 0, 1, 2-3, 4-7, 8-15, 16-31, 32 and beyond."""


def stratum_of(positions: npt.NDArray[Any], starts: tuple[int, ...] = POSITION_STRATA) -> Integers:
    """The stratum of each position within its target."""
    return np.searchsorted(np.array(starts), positions, side="right").astype(np.int64) - 1


@dataclass
class StratumSums:
    """Sums over clusters of activations and tokens in each column, and of their products.

    Columns are the strata of the positive side, then those of the negative: K = 2 × strata. Tables are int64,
    or Python integers once int64 could not hold them.
    """

    starts: tuple[int, ...]
    """First position of each stratum."""
    a: Any
    """[K, layers, experts]"""
    aa: Any
    """[K(K + 1)/2, layers, experts]: products of columns j ≤ k, in the order (0, 0), (0, 1) … (1, 1) …"""
    an: Any
    """[K, K, layers, experts]: activations of column j times tokens of column k"""
    n: list[int]
    nn: list[int]
    """Products of tokens, in the order of `aa`."""
    clusters: int = 0

    @classmethod
    def zeros(cls, layers: int, experts: int, starts: tuple[int, ...] = POSITION_STRATA) -> StratumSums:
        """No cluster yet."""
        k = 2 * len(starts)
        half = k * (k + 1) // 2
        a, aa, an = (np.zeros((*first, layers, experts), np.int64) for first in ((k,), (half,), (k, k)))
        return cls(starts, a, aa, an, [0] * k, [0] * half)

    @property
    def columns(self) -> int:
        """K = 2 × strata."""
        return len(self.n)

    def add(self, a: Integers, n: Integers) -> None:
        """Add clusters: activations int64 [clusters, K, layers, experts], tokens int64 [clusters, K]."""
        columns = range(self.columns)
        part = StratumSums(
            self.starts,
            a.sum(axis=0),
            np.stack([product_sum(a[:, j], a[:, k]) for j, k in halves(self.columns)]),
            np.stack([[product_sum(a[:, j], n[:, k, None, None]) for k in columns] for j in columns]),
            [int(value) for value in n.sum(axis=0)],
            [int(product_sum(n[:, j], n[:, k])) for j, k in halves(self.columns)],
            len(n),
        )
        total = self + part
        # Object only where int64 will not do, whatever the parts took.
        dtype = object if self.a.dtype == object or total._outgrows_int64() else np.int64
        for name in ("a", "aa", "an"):
            setattr(self, name, getattr(total, name).astype(dtype))
        self.n, self.nn, self.clusters = total.n, total.nn, total.clusters

    def to_tensors(self) -> tuple[dict[str, Integers], dict[str, Any]]:
        """The tables as int64 (two limbs where they are larger), the others as JSON, in digits."""
        facts = {
            "starts": list(self.starts),
            "n": [str(value) for value in self.n],
            "nn": [str(value) for value in self.nn],
            "clusters": str(self.clusters),
        }
        return {name: as_limbs(getattr(self, name)) for name in ("a", "aa", "an")}, facts

    @classmethod
    def from_tensors(cls, tables: Mapping[str, Integers], facts: Mapping[str, Any]) -> StratumSums:
        """What `to_tensors` gave, which must have been checked."""
        a, aa, an = (from_limbs(tables[name], size) for name, size in (("a", 3), ("aa", 3), ("an", 4)))
        n, nn = ([int(text) for text in facts[name]] for name in ("n", "nn"))
        return cls(tuple(facts["starts"]), a, aa, an, n, nn, int(facts["clusters"]))

    def __add__(self, other: StratumSums) -> StratumSums:
        total = StratumSums(
            self.starts,
            self.a,
            self.aa,
            self.an,
            [x + y for x, y in zip(self.n, other.n, strict=True)],
            [x + y for x, y in zip(self.nn, other.nn, strict=True)],
            self.clusters + other.clusters,
        )
        if total._outgrows_int64():
            total._widen()  # before the tables are added, which wrap around without a word
        for name in ("a", "aa", "an"):
            setattr(total, name, getattr(total, name) + getattr(other, name))
        return total

    def _outgrows_int64(self) -> bool:
        """Whether a table may: with a ≤ n none exceeds the largest sum of products of n."""
        return max(*self.n, *self.nn) > INT64_MAX

    def _widen(self) -> None:
        for name in ("a", "aa", "an"):
            setattr(self, name, getattr(self, name).astype(object))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StratumSums)
            and (self.starts, self.n, self.nn, self.clusters)
            == (other.starts, other.n, other.nn, other.clusters)
            and all(np.array_equal(getattr(self, x), getattr(other, x)) for x in ("a", "aa", "an"))
        )

    __hash__ = None  # type: ignore[assignment]


def estimate(sums: StratumSums) -> Estimate:
    """Δ over strata and its standard error, [layers, experts].

    NaN where no stratum has tokens of both sides; the error NaN below `LEAST_CLUSTERS` clusters.
    """
    strata = len(sums.starts)
    n1, n2 = sums.n[:strata], sums.n[strata:]
    a = sums.a.astype(object)
    common = math.lcm(*(x + y for x, y in zip(n1, n2, strict=True) if x + y))
    share = [common // (x + y) if x + y else 0 for x, y in zip(n1, n2, strict=True)]
    # R and W times `common`, as integers.
    difference = sum(share[t] * (a[t] * n2[t] - a[strata + t] * n1[t]) for t in range(strata)) + np.zeros(
        a.shape[1:], object
    )
    weight = sum(share[t] * n1[t] * n2[t] for t in range(strata))
    if weight == 0:
        nothing = np.full(a.shape[1:], np.nan)
        return Estimate(nothing, nothing.copy(), sums.clusters)
    delta = true_division(difference, weight)
    if sums.clusters < LEAST_CLUSTERS:
        return Estimate(delta, np.full(delta.shape, np.nan), sums.clusters)
    squares = _squares(sums, share, common, difference, weight)
    groups = sums.clusters
    variance = true_division(squares * groups, weight**4 * common**2 * (groups - 1))
    return Estimate(delta, np.sqrt(variance), groups)


def _squares(sums: StratumSums, share: list[int], common: int, difference: Any, weight: int) -> Any:
    """Σψ² times weight⁴ · common², exactly: integers [layers, experts].

    With R' = common R and W' = common W: W'² common ψ_i = W' common² r_i - R' common² w_i, whose coefficients
    of a and n are integers.
    """
    strata = len(share)
    n1, n2, a = sums.n[:strata], sums.n[strata:], sums.a.astype(object)
    of_a = [weight * common * share[t] * n2[t] for t in range(strata)]
    of_a += [-weight * common * share[t] * n1[t] for t in range(strata)]
    both = [share[t] ** 2 * (a[t] + a[strata + t]) * weight for t in range(strata)]
    of_n = [-both[t] * n2[t] - difference * (share[t] * n2[t]) ** 2 for t in range(strata)]
    of_n += [both[t] * n1[t] - difference * (share[t] * n1[t]) ** 2 for t in range(strata)]
    total = np.zeros(a.shape[1:], object)
    for place, (j, k) in enumerate(halves(sums.columns)):
        times = 1 if j == k else 2
        total = total + times * of_a[j] * of_a[k] * sums.aa[place].astype(object)
        total = total + times * sums.nn[place] * (of_n[j] * of_n[k])
    for j in range(sums.columns):
        inner = sum(of_n[k] * sums.an[j, k].astype(object) for k in range(sums.columns))
        total = total + 2 * of_a[j] * inner
    return total


def differences(a: npt.NDArray[Any], n: npt.NDArray[Any]) -> Floats:
    """Δ of many counts at once, in floating point: [replicates, layers, experts].

    Args:
        a: [replicates, K, layers, experts], columns as in `StratumSums` (two columns: no strata).
        n: [replicates, K].
    """
    strata = n.shape[1] // 2
    n1, n2 = n[:, :strata].astype(np.float64), n[:, strata:].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(n1 + n2 > 0, n1 * n2 / (n1 + n2), 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
        each = [np.where(n_ > 0, weight / n_, 0.0) for n_ in (n1, n2)]
    total = np.zeros((len(n), *a.shape[2:]))
    for t in range(strata):
        total += each[0][:, t, None, None] * a[:, t] - each[1][:, t, None, None] * a[:, strata + t]
    total[~(weight.sum(axis=1) > 0)] = np.nan
    return total


def halves(columns: int) -> list[tuple[int, int]]:
    """Pairs of columns j ≤ k."""
    return list(combinations_with_replacement(range(columns), 2))
