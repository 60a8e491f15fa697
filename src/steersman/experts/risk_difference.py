"""Risk differences of expert activation, with errors that respect clusters: pure maths on exact integer sums.

For each expert, side s and cluster i (a pair, or all pairs of a group): a_si of n_si target tokens used the
expert. With A = Σa, N = Σn, p = A/N (SteerMoE, arXiv 2509.09660, equations 3 and 4):

    Δ  = p_1 - p_2
    ψ_i = (a_1i - p_1 n_1i)/N_1 - (a_2i - p_2 n_2i)/N_2     (influence of a cluster: linearised ratios)
    se² = G/(G - 1) Σ ψ_i²                                    (G clusters; t with G - 1 degrees of freedom)

Σψ² is a polynomial in the sums of a, n and their products: these are kept as integers, so that adding the
sums of shards gives the very result of one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from steersman.experts.estimate import LEAST_CLUSTERS, Estimate, Floats, true_division
from steersman.experts.moments import INT64_MAX, Integers, as_limbs, from_limbs, product_sum


@dataclass
class ClusterSums:
    """Sums over clusters of activations a_s and tokens n_s of the two sides (1 positive, 2 negative), and of
    their products.

    Those with an `a` are int64 [layers, experts], or Python integers once int64 could not hold them; the
    others are plain integers.
    """

    a1: Integers
    a2: Integers
    a1a1: Integers
    a1a2: Integers
    a2a2: Integers
    a1n1: Integers
    a1n2: Integers
    a2n1: Integers
    a2n2: Integers
    n1: int = 0
    n2: int = 0
    n1n1: int = 0
    n1n2: int = 0
    n2n2: int = 0
    clusters: int = 0

    @classmethod
    def zeros(cls, layers: int, experts: int, dtype: type = np.int64) -> ClusterSums:
        """No cluster yet; `object` as dtype takes integers of any size from the start."""
        tables: list[Any] = list(np.zeros((9, layers, experts), dtype))
        return cls(*tables)

    def add(self, a1: Integers, n1: int, a2: Integers, n2: int) -> None:
        """Add one cluster: its activations [layers, experts] and tokens on either side (no expert is used
        more often than there are tokens).
        """
        self.n1 += n1
        self.n2 += n2
        self.n1n1 += n1 * n1
        self.n1n2 += n1 * n2
        self.n2n2 += n2 * n2
        self.clusters += 1
        if self._outgrows_int64() or self.a1.dtype == object:
            self._widen()
            a1, a2 = a1.astype(object), a2.astype(object)
        self.a1 += a1
        self.a2 += a2
        self.a1a1 += a1 * a1
        self.a1a2 += a1 * a2
        self.a2a2 += a2 * a2
        self.a1n1 += a1 * n1
        self.a1n2 += a1 * n2
        self.a2n1 += a2 * n1
        self.a2n2 += a2 * n2

    def add_clusters(self, a: Integers, n: Integers) -> None:
        """Add many clusters at once: activations int64 [clusters, 2, layers, experts], tokens int64
        [clusters, 2].
        """
        a1, a2, n1, n2 = a[:, 0], a[:, 1], n[:, 0], n[:, 1]
        columns1, columns2 = n1[:, None, None], n2[:, None, None]
        part = ClusterSums(
            a1=a1.sum(axis=0),
            a2=a2.sum(axis=0),
            a1a1=product_sum(a1, a1),
            a1a2=product_sum(a1, a2),
            a2a2=product_sum(a2, a2),
            a1n1=product_sum(a1, columns1),
            a1n2=product_sum(a1, columns2),
            a2n1=product_sum(a2, columns1),
            a2n2=product_sum(a2, columns2),
            n1=int(n1.sum()),
            n2=int(n2.sum()),
            n1n1=int(product_sum(n1, n1)),
            n1n2=int(product_sum(n1, n2)),
            n2n2=int(product_sum(n2, n2)),
            clusters=len(n),
        )
        total = self + part
        wide = self.a1.dtype == object or total._outgrows_int64()
        for field in fields(self):
            value = getattr(total, field.name)
            if isinstance(value, np.ndarray):  # object only where int64 will not do, whatever the parts took
                value = value.astype(object if wide else np.int64)
            setattr(self, field.name, value)

    def to_tensors(self) -> tuple[dict[str, Integers], dict[str, str]]:
        """The tables as int64 (two limbs where they are larger), the others as digits: JSON numbers have a
        size.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tables = {name: as_limbs(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        return tables, {name: str(value) for name, value in values.items() if name not in tables}

    @classmethod
    def from_tensors(cls, tables: Mapping[str, Integers], scalars: Mapping[str, str]) -> ClusterSums:
        """What `to_tensors` gave, which must have been checked."""
        values: dict[str, Any] = {name: from_limbs(table, 2) for name, table in tables.items()}
        values |= {name: int(text) for name, text in scalars.items()}
        return cls(**values)

    def __add__(self, other: ClusterSums) -> ClusterSums:
        names = [field.name for field in fields(self)]
        scalars = {
            name: getattr(self, name) + getattr(other, name)
            for name in names
            if isinstance(getattr(self, name), int)
        }
        total = replace(self, **scalars)
        if total._outgrows_int64():
            total._widen()  # before the tables are added, which wrap around without a word
        for name in names:
            if name not in scalars:
                setattr(total, name, getattr(total, name) + getattr(other, name))
        return total

    def _outgrows_int64(self) -> bool:
        """Whether a table may: with a ≤ n none exceeds the largest sum of products of n (Cauchy-Schwarz)."""
        return max(self.n1, self.n2, self.n1n1, self.n2n2) > INT64_MAX

    def _widen(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                setattr(self, field.name, value.astype(object))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSums) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]


def rates(sums: ClusterSums) -> Floats:
    """Activation rates p, [2, layers, experts]: the share of target tokens of each side that used the
    expert.
    """
    return np.stack([_ratio(sums.a1, sums.n1), _ratio(sums.a2, sums.n2)])


def risk_difference(sums: ClusterSums) -> Floats:
    """Δ = p_1 - p_2, [layers, experts]: exact but for one rounding."""
    if sums.n1 == 0 or sums.n2 == 0:
        return np.full(sums.a1.shape, np.nan)
    numerator = sums.a1.astype(object) * sums.n2 - sums.a2.astype(object) * sums.n1
    return true_division(numerator, sums.n1 * sums.n2)


def standard_error(sums: ClusterSums) -> Floats:
    """Cluster-robust standard error of Δ, [layers, experts]; NaN below `LEAST_CLUSTERS` clusters."""
    groups = sums.clusters
    if groups < LEAST_CLUSTERS:
        return np.full(sums.a1.shape, np.nan)
    exact: dict[str, Any] = {
        field.name: value.astype(object)
        if isinstance(value := getattr(sums, field.name), np.ndarray)
        else value
        for field in fields(sums)
    }
    a1, a2, n1, n2 = exact["a1"], exact["a2"], sums.n1, sums.n2
    # u_i = N_1 a_1i - A_1 n_1i and v_i likewise are integers; ψ_i = u_i/N_1² - v_i/N_2².
    uu = n1 * n1 * exact["a1a1"] - 2 * n1 * a1 * exact["a1n1"] + a1 * a1 * sums.n1n1
    vv = n2 * n2 * exact["a2a2"] - 2 * n2 * a2 * exact["a2n2"] + a2 * a2 * sums.n2n2
    uv = n1 * n2 * exact["a1a2"] - n1 * a2 * exact["a1n2"] - n2 * a1 * exact["a2n1"] + a1 * a2 * sums.n1n2
    numerator = n2**4 * uu - 2 * n1**2 * n2**2 * uv + n1**4 * vv
    variance = true_division(numerator * groups, n1**4 * n2**4 * (groups - 1))
    return np.sqrt(variance)


def estimate(sums: ClusterSums) -> Estimate:
    """Δ with its standard error."""
    return Estimate(risk_difference(sums), standard_error(sums), sums.clusters)


def interval(sums: ClusterSums, level: float = 0.95) -> tuple[Floats, Floats]:
    """Two-sided t interval of Δ, kept within [-1, 1]: (low, high), each [layers, experts].

    NaN below `LEAST_CLUSTERS` clusters.
    """
    return estimate(sums).interval(level)


def p_values(sums: ClusterSums) -> Floats:
    """Two-sided p-value of Δ = 0, [layers, experts]; 1 where Δ and its error are both 0; NaN below
    `LEAST_CLUSTERS`.
    """
    return estimate(sums).p_values()


def _ratio(numerator: Integers, denominator: int) -> Floats:
    if denominator == 0:
        return np.full(numerator.shape, np.nan)
    return true_division(numerator.astype(object), denominator)
