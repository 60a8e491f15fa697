"""The map of experts that a report shows: how they differ in use, what they cause, and which are steered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.steering import Steering

if TYPE_CHECKING:
    from steersman.experts.causal import CausalScreen
    from steersman.experts.contrast import RoutingContrast


def expert_map(
    steerings: Mapping[str, Steering], contrast: RoutingContrast | None, screen: CausalScreen | None
) -> dict[str, Any] | None:
    """Plan → layers, and [layer][expert] the risk differences and causal effects that were given; None where
    there is nothing to show.
    """
    named = [name for name, plan in steerings.items() if plan.strengths]
    if not named or (contrast is None and screen is None):
        return None
    differences = contrast.risk_difference if contrast is not None else None
    if differences is None and screen is not None:
        differences = screen.risk_difference
    layers = contrast.layers if contrast is not None else screen.layers if screen is not None else []
    figures = {
        "layers": [int(layer) for layer in layers],
        "risk_difference": None if differences is None else _plain(differences),
        "deactivate": None if screen is None else _plain(screen.deactivate.mean),
        "activate": None if screen is None else _plain(screen.activate.mean),
    }
    return dict.fromkeys(named, figures)


def _plain(values: Any) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in np.asarray(values)]
