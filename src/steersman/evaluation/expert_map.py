"""The map of experts that a report shows: how they differ in use, what they cause, and which are steered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.steering import Steering

if TYPE_CHECKING:
    from steersman.experts.causal import CausalScreen
    from steersman.experts.contrast import RoutingContrast


FIGURES = ("risk_difference", "deactivate", "activate")


def expert_map(
    steerings: Mapping[str, Steering], contrast: RoutingContrast | None, screen: CausalScreen | None
) -> dict[str, Any] | None:
    """Plan → layers, and [layer][expert] the risk differences and causal effects that were given; None where
    there is nothing to show.
    """
    named = [name for name, plan in steerings.items() if plan.strengths]
    if not named or (contrast is None and screen is None):
        return None
    found: dict[str, tuple[Sequence[int], Any]] = {}
    if screen is not None:
        found["risk_difference"] = (screen.layers, screen.risk_difference)
        found["deactivate"] = (screen.layers, screen.deactivate.mean)
        found["activate"] = (screen.layers, screen.activate.mean)
    if contrast is not None:
        found["risk_difference"] = (contrast.layers, contrast.risk_difference)
    layers = sorted({int(layer) for own, _ in found.values() for layer in own})
    figures = {name: _plain(*found.get(name, ((), None)), layers) for name in FIGURES}
    return {name: {"layers": layers, **figures} for name in named}


def _plain(own: Sequence[int], values: Any, layers: Sequence[int]) -> list[list[float | None]] | None:
    """Values by rows of `own` layers as rows of `layers`; None where there are none at all."""
    if values is None:
        return None
    table = np.asarray(values)
    rows = dict(zip(own, table, strict=True))
    nothing = np.full(table.shape[1], np.nan)
    return [
        [float(value) if np.isfinite(value) else None for value in rows.get(layer, nothing)]
        for layer in layers
    ]
