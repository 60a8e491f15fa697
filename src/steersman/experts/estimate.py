"""A difference per expert with its standard error, and what follows: interval, p-value, q-value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

LEAST_CLUSTERS = 20
"""Below this number of clusters a t interval means too little: none is given."""


@dataclass(frozen=True)
class Estimate:
    """Differences and their cluster-robust standard errors, each float64 [layers, experts]."""

    difference: Floats
    standard_error: Floats
    clusters: int
    """Independent units: t has one degree of freedom less. Where two contrasts are in it, the fewer of
    both."""
    reach: float = 1.0
    """No difference can be larger: intervals stay within."""

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Two-sided t interval: (low, high); NaN below `LEAST_CLUSTERS` clusters."""
        if self.clusters < LEAST_CLUSTERS:
            nothing = np.full(self.difference.shape, np.nan)
            return nothing, nothing.copy()
        margin = self.margin(level)
        low, high = self.difference - margin, self.difference + margin
        return np.maximum(low, -self.reach), np.minimum(high, self.reach)

    def margin(self, level: float = 0.95) -> Floats:
        """Half the width of the interval."""
        if self.clusters < LEAST_CLUSTERS:
            return np.full(self.difference.shape, np.nan)
        return np.asarray(stats.t.ppf((1 + level) / 2, self.clusters - 1) * self.standard_error)

    def p_values(self) -> Floats:
        """Two-sided p-values of no difference; 1 where difference and error are both 0; NaN below
        `LEAST_CLUSTERS` clusters.
        """
        error, delta = self.standard_error, self.difference
        if self.clusters < LEAST_CLUSTERS:
            return np.full(delta.shape, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * stats.t.sf(np.abs(delta) / error, self.clusters - 1)
        return np.asarray(np.where(error == 0, np.where(delta == 0, 1.0, 0.0), p), dtype=np.float64)

    def where(self, valid: npt.NDArray[np.bool_]) -> Estimate:
        """The same with NaN where a layer has no such expert."""
        return Estimate(
            np.where(valid, self.difference, np.nan),
            np.where(valid, self.standard_error, np.nan),
            self.clusters,
            self.reach,
        )


def q_values(p: Floats, valid: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Benjamini-Hochberg q over all layers × experts; NaN where p is NaN or the place is not `valid`."""
    usable = ~np.isnan(p) if valid is None else valid & ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    if usable.any():
        q[usable] = stats.false_discovery_control(p[usable], method="bh")
    return q


def true_division(numerator: npt.NDArray[np.object_], denominator: int) -> Floats:
    """Integers of any size divided with one correct rounding."""
    return np.asarray([int(value) / denominator for value in numerator.flat], dtype=np.float64).reshape(
        numerator.shape
    )
