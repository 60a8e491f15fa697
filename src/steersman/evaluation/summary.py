"""From what was noted of each item to rates, means and differences with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.evaluation.comparison import BASE
from steersman.evaluation.judges.verdict import OUTCOMES
from steersman.evaluation.measures.measure import Measured, Metric
from steersman.evaluation.planning import Arms, Cell
from steersman.evaluation.result import number
from steersman.evaluation.statistics import (
    PairedDifference,
    bootstrap_interval,
    clustered_mean,
    detectable_difference,
    holm,
    mean_difference,
    paired_difference,
    rate,
)
from steersman.evaluation.tasks import Task

Noted = Mapping[str, Sequence[Measured]]
"""Arm → what was noted of each item, in the task's order."""


NO_INTERVAL = {"low": None, "high": None, "effective_count": 1.0, "method": "none: the items are one group"}


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """The task's metrics, and the shares of the other sides where it has sides."""
    metrics = task.measure.metrics
    if not task.measure.sides:
        return metrics
    named = {metric.name for metric in metrics}
    sides = {
        "positive": task.behaviour.positive,
        "negative": task.behaviour.negative,
        "neither": "neither side",
    }
    own = tuple(
        Metric(metric.name, sides[metric.name], metric.kind, metric.better)
        if metric.name in sides
        else metric
        for metric in metrics
    )
    return own + tuple(Metric(side, sides[side]) for side in OUTCOMES if side not in named)


def values_of(noted: Sequence[Measured], metric: Metric) -> NDArray[np.float64]:
    """A metric's number for each item, float64 [items]; NaN where there is none.

    An answer that the judge could not place is on no side: NaN for the sides' shares.
    """
    if metric.name in OUTCOMES:
        return np.array(
            [math.nan if one.outcome is None else float(one.outcome == metric.name) for one in noted]
        )
    return np.array([_number(one.scores.get(metric.name)) for one in noted])


def results(task: Task, noted: Noted, metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """Arm → metric → rate or mean, as JSON; None where no item has the number."""
    return {
        arm: {metric.name: _figure(values_of(found, metric), metric, task.groups) for metric in metrics}
        for arm, found in noted.items()
    }


def differences(
    task: Task, noted: Noted, metrics: Sequence[Metric], arms: Arms
) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Arm → metric → its difference to the base on the items that both have a number for.

    `p_holm` is adjusted over all steered, reversed, dialled and prompted arms of a metric.
    """
    base = noted[BASE]
    found: dict[str, dict[str, dict[str, Any] | None]] = {
        arm: {
            metric.name: _difference(values_of(base, metric), values_of(own, metric), metric, task.groups)
            for metric in metrics
        }
        for arm, own in noted.items()
        if arm != BASE
    }
    for metric in metrics:
        rows = [found[arm.name][metric.name] for arm in arms if arm.name in found]
        adjusted = holm([None if row is None else row["p"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            if row is not None:
                row["p_holm"] = p
    return found


def by_kind(task: Task, noted: Noted, metric: Metric) -> dict[str, Any]:
    """Kind → items and, for each arm, the first metric on them; empty where there is one kind."""
    kinds = sorted({item.kind for item in task if item.kind})
    if len(kinds) < 2:
        return {}
    table: dict[str, Any] = {}
    for kind in kinds:
        places = [place for place, item in enumerate(task) if item.kind == kind]
        groups = [task.groups[place] for place in places]
        table[kind] = {
            "items": len(places),
            "results": {
                arm: {metric.name: _figure(values_of(found, metric)[places], metric, groups)}
                for arm, found in noted.items()
            },
        }
    return table


def detectable(task: Task, noted: Noted, metrics: Sequence[Metric]) -> dict[str, float]:
    """Metric → the smallest difference to the base that so many items show with 80 % power: of rates, if all
    items that change change the same way.
    """
    found = {}
    for metric in metrics:
        figure = _figure(values_of(noted[BASE], metric), metric, task.groups)
        if figure is not None and metric.kind == "rate" and figure["low"] is not None:
            found[metric.name] = detectable_difference(figure["effective_count"])
    return found


def unjudged(noted: Noted) -> dict[str, int]:
    """Arm → how many answers the judge could not place."""
    return {arm: sum(one.outcome is None for one in found) for arm, found in noted.items()}


def interactions(task: Task, noted: Noted, cells: Sequence[Cell], metric: Metric) -> list[dict[str, Any]]:
    """How the effect of a plan changes under an attack and a defence, item by item.

    (steered − unsteered under them) − (steered − unsteered without them), with a cluster-robust t interval.
    """
    arm_of = {(cell.attack, cell.defence, cell.steering): cell.arm for cell in cells}
    rows: list[dict[str, Any]] = []
    for (attack, defence, steering), arm in arm_of.items():
        if steering is None or (attack is None and defence is None):
            continue
        here = values_of(noted[arm], metric) - values_of(noted[arm_of[attack, defence, None]], metric)
        plain = values_of(noted[arm_of[None, None, steering]], metric) - values_of(noted[BASE], metric)
        kept = np.isfinite(here) & np.isfinite(plain)
        if not kept.any():
            continue
        difference = mean_difference(plain[kept], here[kept], _kept(task.groups, kept)).to_json()
        rows.append({"attack": attack, "defence": defence, "steering": steering, **difference})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def _figure(values: NDArray[np.float64], metric: Metric, groups: Sequence[str]) -> dict[str, Any] | None:
    kept = np.isfinite(values)
    if not kept.any():
        return None
    of_kept = _kept(groups, kept)
    if metric.kind == "mean":
        return clustered_mean(values[kept], of_kept).to_json()
    if _alike(of_kept):
        return {**rate(values[kept]).to_json(), **NO_INTERVAL}
    return rate(values[kept], of_kept).to_json()


def _difference(
    base: NDArray[np.float64], own: NDArray[np.float64], metric: Metric, groups: Sequence[str]
) -> dict[str, Any] | None:
    kept = np.isfinite(base) & np.isfinite(own)
    if not kept.any():
        return None
    of_kept = _kept(groups, kept)
    bootstrap = [number(limit) for limit in bootstrap_interval(own[kept] - base[kept], of_kept)]
    if metric.kind == "mean":
        return {**mean_difference(base[kept], own[kept], of_kept).to_json(), "bootstrap": bootstrap}
    if _alike(of_kept):
        plain = paired_difference(base[kept], own[kept]).to_json()
        return {
            **plain,
            **NO_INTERVAL,
            "p": None,
            "test": NO_INTERVAL["method"],
            "bootstrap": bootstrap,
            "minimum_detectable": None,
        }
    found = paired_difference(base[kept], own[kept], of_kept)
    return {**found.to_json(), "bootstrap": bootstrap, "minimum_detectable": _detectable(found)}


def _detectable(found: PairedDifference) -> float:
    changed = (found.only_first + found.only_second) / found.count
    return detectable_difference(found.effective_count, changed)


def _kept(groups: Sequence[str], kept: NDArray[np.bool_]) -> list[str]:
    return [group for group, keep in zip(groups, kept, strict=True) if keep]


def _alike(groups: Sequence[str]) -> bool:
    """Whether several items are all of one group: how much they would vary cannot be told."""
    return len(groups) > 1 and len(set(groups)) == 1


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
