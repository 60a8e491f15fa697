"""A nuisance regressed out: what of a contrast is left once another contrast's share is taken away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steersman.experts.estimate import Estimate, Floats


@dataclass(frozen=True)
class Adjustment:
    """Δ_adj = Δ - b Δ_nuisance over all layers × experts."""

    estimate: Estimate
    slope: float
    """b: how much of the nuisance is in the contrast."""
    share: float
    """Share of ΣΔ² that goes away, 0 to 1."""


def adjust(contrast: Estimate, nuisance: Estimate, *, dependent: bool = False) -> Adjustment:
    """Regress a nuisance out of a contrast by least squares.

    b = Σ Δ Δ_nuisance / Σ Δ_nuisance², without intercept (Δ adds up to 0 in each layer); 0 where the nuisance
    is nowhere.

    The error is sqrt(se² + b² se_nuisance²), as for two independent contrasts. Where they share clusters
    (`dependent`) it is se + |b| se_nuisance, which no dependence can exceed. Both take b as known: its own
    error, from noise in thousands of Δ at once, is left out. A bootstrap computes b again in each replicate,
    and so has it. t takes the fewer clusters of the two.
    """
    slope, share = slope_of(contrast.difference, nuisance.difference)
    left = contrast.difference - slope * nuisance.difference
    errors = contrast.standard_error, abs(slope) * nuisance.standard_error
    error = errors[0] + errors[1] if dependent else np.hypot(*errors)
    estimate = Estimate(
        left, error, min(contrast.clusters, nuisance.clusters), contrast.reach + abs(slope) * nuisance.reach
    )
    return Adjustment(estimate, slope, share)


def slope_of(delta: Floats, nuisance: Floats) -> tuple[float, float]:
    """(b, share of Σδ² that b explains), over the places where both are numbers."""
    usable = ~(np.isnan(delta) | np.isnan(nuisance))
    x, y = nuisance[usable].tolist(), delta[usable].tolist()
    cross = math.fsum(i * j for i, j in zip(x, y, strict=True))
    of_x, of_y = math.fsum(i * i for i in x), math.fsum(j * j for j in y)
    if of_x == 0 or of_y == 0:
        return 0.0, 0.0
    return cross / of_x, min(1.0, cross / of_x * cross / of_y)


def adjusted_replicates(
    delta: npt.NDArray[np.float64], nuisance: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Δ_adj of each replicate with its own b: [replicates, layers, experts] from two such."""
    return np.stack(
        [one - slope_of(one, other)[0] * other for one, other in zip(delta, nuisance, strict=True)]
    )
