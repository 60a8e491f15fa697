"""Effects of single experts with their errors: changes of d, item by item, averaged over clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from steersman.evaluation.screening.exact import Edit, Floats
from steersman.evaluation.statistics import clustered_mean
from steersman.experts.causal_effects import SIGNS, Effects, Sign
from steersman.experts.estimate import Estimate
from steersman.limits import Router, broken_limit

STRENGTHS: dict[Sign, float] = {"deactivate": -1.0, "activate": 1.0}


def edits_of(routers: Sequence[Router], signs: Sequence[Sign]) -> dict[int, list[Edit]]:
    """Layer → each of its experts alone, with each sign; those that break a limit alone are left out."""
    return {
        router.layer: [
            (router.layer, expert, STRENGTHS[sign])
            for sign in signs
            for expert in range(router.experts)
            if broken_limit(router, {expert: STRENGTHS[sign]}) is None
        ]
        for router in routers
    }


def effects_of(routers: Sequence[Router], changes: Mapping[Edit, Floats], groups: Sequence[str]) -> Effects:
    """Effects from each edit's changes of d, [items]."""
    shape = (len(SIGNS), len(routers), max(router.experts for router in routers))
    mean, error = np.full((2, *shape), np.nan)
    row = {router.layer: number for number, router in enumerate(routers)}
    for (layer, expert, strength), values in changes.items():
        place = (int(strength > 0), row[layer], expert)
        found = clustered_mean(values, groups)
        mean[place], error[place] = found.mean, found.standard_error
    measured = ~np.isnan(mean)
    p = Estimate(mean, error, len(set(groups))).p_values()
    return Effects(mean, error, np.where(measured, p, np.nan), measured)


def place_of(routers: Sequence[Router], edit: Edit) -> tuple[int, int, int]:
    """Where an edit is in arrays [signs, layers, experts]."""
    layers = [router.layer for router in routers]
    return int(edit[2] > 0), layers.index(edit[0]), edit[1]
