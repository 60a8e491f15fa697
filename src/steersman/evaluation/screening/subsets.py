"""Experts that stand in for each other: random subsets are steered together, and a regression on membership
says what each does on average while random others are steered too.

One such expert alone shows nothing, since others do its work. Every item gets random subsets of its own, so
that what is common to a subset is no source of error; y = d under the subset − d unsteered, least squares on
membership, errors robust to clusters of items (statsmodels).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from statsmodels.api import OLS

from steersman.errors import PlanError
from steersman.evaluation.screening.effects import STRENGTHS
from steersman.evaluation.screening.exact import Floats, Instrument
from steersman.evaluation.screening.greedy import Remember
from steersman.evaluation.screening.texts import Batch, Reading, by_item
from steersman.experts.causal_effects import SIGNS, Bools, Effects, Sign
from steersman.limits import Router, broken_limit

SHARE = 0.25
"""Of a layer's experts that a subset keeps out, or of k that it puts in, on average."""


def membership(router: Router, sign: Sign, count: int, generator: np.random.Generator) -> Bools:
    """Random subsets of a layer's experts, bool [count, experts]: each expert is in one with the same
    probability, whatever the others do, but for those that would break a limit of the router.
    """
    free = router.experts - router.top_k if sign == "deactivate" else router.top_k
    share = min(SHARE, free / 2 / router.experts) if sign == "deactivate" else SHARE * free / router.experts
    found = generator.random((count, router.experts)) < share
    for subset in found:
        for expert in generator.permutation(np.flatnonzero(subset)):
            if broken_limit(router, dict.fromkeys(np.flatnonzero(subset).tolist(), STRENGTHS[sign])) is None:
                break
            subset[expert] = False
    return found


def subset_effects(
    instrument: Instrument,
    routers: Sequence[Router],
    reading: Reading,
    signs: Sequence[Sign],
    per_item: int,
    seed: int,
    remember: Remember,
) -> Effects:
    """Average effects of each expert over `per_item` random subsets an item and sign.

    Raises PlanError where there are too few subsets to tell so many experts apart.
    """
    experts = sum(router.experts for router in routers)
    if per_item * reading.items < 2 * experts:
        least = -(-2 * experts // reading.items)
        raise PlanError(f"subsets={per_item}: too few to tell {experts} experts apart; use {least} or more")
    shape = (len(SIGNS), len(routers), max(router.experts for router in routers))
    mean, error, p = np.full((3, *shape), np.nan)
    for sign in signs:
        generator = np.random.default_rng([seed, SIGNS.index(sign)])
        members = np.zeros((per_item, reading.items, *shape[1:]), bool)
        for row, router in enumerate(routers):
            drawn = membership(router, sign, per_item * reading.items, generator)
            members[:, :, row, : router.experts] = drawn.reshape(per_item, reading.items, -1)
        change = _changes(instrument, routers, reading, sign, members, remember)
        for array, values in zip((mean, error, p), regress(change, members, reading.groups), strict=True):
            array[SIGNS.index(sign)] = values
    return Effects(mean, error, p, ~np.isnan(mean))


def regress(
    change: Floats,
    members: Bools,
    groups: Sequence[str],
) -> tuple[Floats, Floats, Floats]:
    """Coefficients of membership, their cluster-robust errors and p-values, each [layers, experts]; NaN for
    experts that are in no subset.

    Args:
        change: y, [subsets an item, items].
        members: bool [subsets an item, items, layers, experts].
        groups: Of the items.
    """
    layers, experts = members.shape[2:]
    x = members.reshape(-1, layers, experts).astype(np.float64)
    used = x.any(axis=0)
    names: dict[str, int] = {}
    codes = np.tile([names.setdefault(group, len(names)) for group in groups], len(change))
    design = np.column_stack([np.ones(len(x)), x[:, used]])
    fit = OLS(change.reshape(-1), design).fit(cov_type="cluster", cov_kwds={"groups": codes})
    mean, error, p = np.full((3, layers, experts), np.nan)
    mean[used], error[used] = fit.params[1:], fit.bse[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        p[used] = 2 * stats.t.sf(np.abs(mean[used]) / error[used], len(names) - 1)
    p[used & (error == 0)] = 1.0
    return mean, error, p


def _changes(
    instrument: Instrument,
    routers: Sequence[Router],
    reading: Reading,
    sign: Sign,
    members: Bools,
    remember: Remember,
) -> Floats:
    """d under each subset less d unsteered, [subsets an item, items]."""
    found = np.zeros((1 + len(members), len(reading.texts)))
    owner = np.array([text.item for text in reading.texts])
    for batch in instrument.batches(reading):
        found[0, batch.texts] = remember(
            f"subsets {sign}, batch {batch.name}", functools.partial(_base, instrument, batch)
        )
        for turn, of_items in enumerate(members):
            chosen = torch.from_numpy(of_items[owner[batch.texts]]).float() * STRENGTHS[sign]
            plans = {router.layer: chosen[:, row, : router.experts] for row, router in enumerate(routers)}
            work = functools.partial(instrument.subsets, batch, np.arange(batch.rows), plans)
            found[1 + turn, batch.texts] = remember(f"subsets {sign}, batch {batch.name}, turn {turn}", work)
    values = by_item(reading, found)
    change: Floats = values[1:] - values[0]
    return change


def _base(instrument: Instrument, batch: Batch) -> Floats:
    return instrument.base(batch).values
