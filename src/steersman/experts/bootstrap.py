"""An online bootstrap over clusters: replicates whose weights come from a hash, so that shards and resumed
runs give the same ones.

Each replicate weighs each cluster by an independent Poisson(1) number (J. A. Hanley and B. MacGibbon,
Creating non-parametric bootstrap samples using Poisson frequencies, Computer Methods and Programs in
Biomedicine 83 (2006); N. Chamandy et al., Estimating uncertainty for massive data streams, 2012), which for
many clusters is drawing them with replacement, and needs no number of clusters beforehand. Weights are
integers, so that sums stay exact; memory does not depend on the number of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from steersman.errors import PairsError
from steersman.experts.moments import INT64_MAX, Integers, weighted_sum

_BLOCK = 16
"""Replicates that are added up at a time: a bound on memory beside the replicates themselves."""


@dataclass(frozen=True, eq=False)
class Replicates:
    """Weighted sums of each replicate; columns as in `StratumSums` (without strata: the two sides)."""

    activations: Integers
    """int64 [replicates, K, layers, experts]"""
    tokens: Integers
    """int64 [replicates, K]"""

    @classmethod
    def zeros(cls, number: int, columns: int, layers: int, experts: int) -> Replicates:
        """No cluster yet."""
        return cls(
            np.zeros((number, columns, layers, experts), np.int64), np.zeros((number, columns), np.int64)
        )

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def add(self, clusters: Integers, a: Integers, n: Integers) -> None:
        """Add clusters in place: ids int64 [clusters], activations int64 [clusters, K, layers, experts] and
        tokens int64 [clusters, K].

        Raises:
            PairsError: the sums leave 64 bits.
        """
        for start in range(0, self.number, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.number))
            weights = poisson_weights(clusters, np.arange(block.start, block.stop))
            try:
                tokens, activations = weighted_sum(weights, n), weighted_sum(weights, a)
            except OverflowError:
                tokens = None
            if tokens is None or int(self.tokens[block].max()) + int(tokens.max()) > INT64_MAX:
                raise PairsError("too many pairs for a bootstrap in this weighting: its sums outgrow 64 bits")
            self.tokens[block] += tokens
            self.activations[block] += activations  # a ≤ n: what holds n holds these

    def to_tensors(self) -> tuple[dict[str, Integers], int]:
        """The tables, and how many replicates there are."""
        return {"activations": self.activations, "tokens": self.tokens}, self.number

    @classmethod
    def from_tensors(cls, tables: Mapping[str, Integers]) -> Replicates:
        """What `to_tensors` gave, which must have been checked."""
        return cls(tables["activations"].copy(), tables["tokens"].copy())

    def __add__(self, other: Replicates) -> Replicates:
        tokens = self.tokens.astype(object) + other.tokens.astype(object)
        if tokens.size and max(tokens.flat) > INT64_MAX:
            raise PairsError("too many pairs for a bootstrap in this weighting: its sums outgrow 64 bits")
        return Replicates(self.activations + other.activations, self.tokens + other.tokens)


def poisson_weights(clusters: Integers, replicates: npt.NDArray[np.int64]) -> Integers:
    """Poisson(1) numbers, a pure function of cluster id and replicate: int64 [replicates, clusters]."""
    seeds = _mixed(replicates.astype(np.uint64) + np.uint64(1))
    bits = _mixed(clusters.astype(np.int64).view(np.uint64)[None, :] ^ seeds[:, None])
    return np.searchsorted(_THRESHOLDS, bits, side="right").astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (G. L. Steele et al., OOPSLA 2014): each bit of the result depends on every bit."""
    z = values + np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _thresholds() -> npt.NDArray[np.uint64]:
    """2^64 · P(X ≤ k) for Poisson(1), k = 0, 1 … as far as 64 bits tell them from 1: exact integers."""
    e = sum((Fraction(1, math.factorial(j)) for j in range(40)), Fraction(0))
    below, thresholds = Fraction(0), []
    for k in range(40):
        below += Fraction(1) / (e * math.factorial(k))
        threshold = int(below * 2**64)
        if threshold >= 2**64 - 1:
            break
        thresholds.append(threshold)
    return np.array(thresholds, np.uint64)


_THRESHOLDS = _thresholds()
