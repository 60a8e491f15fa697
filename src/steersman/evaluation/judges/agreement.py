"""Agreement of a judge with people: Cohen's kappa over the same items, with its interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

from steersman.errors import PairsError
from steersman.evaluation.judges.verdict import OUTCOMES, Outcome

RESAMPLES = 9_999


@dataclass(frozen=True)
class Agreement:
    """How a judge's sides and people's agree.

    `table` counts items by people's side (rows) and the judge's (columns), both in the order positive,
    negative, neither. `kappa` is 1 where all agree and 0 where no more do than by chance (Cohen
    1960); with its limits it is None where it does not exist: everything on one side, or too few items.
    `unjudged` are labelled items of which the judge could not tell: they are in no other figure.
    """

    kappa: float | None
    low: float | None
    high: float | None
    level: float
    method: str
    share: float
    count: int
    unjudged: int
    table: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("kappa", "low", "high", "level", "method", "share")},
            "count": self.count,
            "unjudged": self.unjudged,
            "sides": list(OUTCOMES),
            "table": [list(row) for row in self.table],
        }


def agreement(
    judged: Sequence[Outcome | None],
    labels: Sequence[Outcome],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Cohen's kappa of a judge's sides and people's labels of the same items.

    Args:
        judged: The judge's sides; None where it could not tell.
        labels: People's.
        groups: What items belong to. Where several share a group, the interval is that of the bootstrap over
            groups (percentiles of 9 999 resamples); otherwise the asymptotic one (Fleiss, Cohen and Everitt
            1969, by statsmodels).

    Raises PairsError where no item has both.
    """
    both = [place for place, side in enumerate(judged) if side is not None]
    if len(judged) != len(labels) or not both:
        raise PairsError(f"{len(both)} items have both a verdict and a label; right is one at least")
    own = [str(groups[place]) if groups is not None else str(place) for place in both]
    tables = _tables([(labels[place], judged[place]) for place in both], own)
    table = tables.sum(axis=0)
    kappa = float(_kappa(table[None])[0])
    clustered = len(tables) < len(both)
    low, high = _by_groups(tables, level, seed) if clustered else _asymptotic(table, level)
    exists = math.isfinite(kappa)
    return Agreement(
        kappa=kappa if exists else None,
        low=low if exists and math.isfinite(low) else None,
        high=high if exists and math.isfinite(high) else None,
        level=level,
        method="bootstrap over groups" if clustered else "asymptotic",
        share=float(np.trace(table) / table.sum()),
        count=len(both),
        unjudged=len(judged) - len(both),
        table=tuple(tuple(int(count) for count in row) for row in table),
    )


def _tables(pairs: Iterable[tuple[Any, Any]], groups: Sequence[str]) -> NDArray[np.int64]:
    """Counts by label and verdict of each group, int64 [groups, 3, 3]."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    tables = np.zeros((len(places), len(OUTCOMES), len(OUTCOMES)), dtype=np.int64)
    for (label, verdict), group in zip(pairs, groups, strict=True):
        tables[places[group], OUTCOMES.index(label), OUTCOMES.index(verdict)] += 1
    return tables


def _kappa(tables: NDArray[Any]) -> NDArray[np.float64]:
    """(p_o − p_e)/(1 − p_e) of tables [n, 3, 3]; NaN where p_e is 1."""
    total = tables.sum(axis=(1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)
    return found


def _by_groups(tables: NDArray[np.int64], level: float, seed: int) -> tuple[float, float]:
    """Percentiles of kappa over resampled groups; resamples in which it does not exist are left out."""
    if len(tables) < 2:
        return math.nan, math.nan
    chances = np.full(len(tables), 1 / len(tables))
    weights = np.random.default_rng(seed).multinomial(len(tables), chances, size=RESAMPLES)
    resampled = _kappa(np.einsum("rg,gij->rij", weights, tables))
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _asymptotic(table: NDArray[np.int64], level: float) -> tuple[float, float]:
    used = (table.sum(axis=0) + table.sum(axis=1)) > 0  # a side that nobody gave has no place in the table
    if used.sum() < 2:
        return math.nan, math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        found = cohens_kappa(table[np.ix_(used, used)])
    if not found.std_kappa > 0:  # every item agrees: the asymptotic error says nothing then
        return math.nan, math.nan
    half = float(stats.norm.ppf((1 + level) / 2)) * float(found.std_kappa)
    return float(found.kappa) - half, float(found.kappa) + half
