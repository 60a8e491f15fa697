"""The experts of an evaluation's plans: how much each accompanies the behaviour, how much it causes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from steersman import ties
from steersman.evaluation.evaluation_report.numbers import change
from steersman.evaluation.evaluation_report.pictures import expert_map
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import Cell, Table, strength, text

MEASURES = {
    "risk_difference": "risk difference",
    "deactivate": "effect when deactivated",
    "activate": "effect when activated",
}
SHOWN = 12
"""Experts in the table, beside those of the plan: the first by each measure."""
WIDE = 20
"""Experts from which maps are too wide to stand beside each other, and stand below each other instead."""


@dataclass(frozen=True)
class Experts:
    """One plan's experts on the page."""

    name: str
    wide: bool
    maps: Sequence[tuple[str, Markup]]
    table: Table


def experts_of(result: Place, *, pictures: bool = True) -> list[Experts]:
    """Maps side by side and a table with ranks, for each plan of which they are known."""
    steerings = {steering["name"]: steering for steering in result.value["steerings"]}
    found = []
    for name in result.value["experts"] or {}:
        place = result["experts"][name]
        plan = _plan(steerings.get(name, {}).get("strengths") or {})
        known = [measure for measure in MEASURES if place.get(measure)]
        layers = place.value["layers"]
        drawn = [
            (MEASURES[m], expert_map(layers, place.value[m], plan, MEASURES[m])) for m in known if pictures
        ]
        wide = len(place.value[known[0]][0]) > WIDE if known else False
        found.append(Experts(name, wide, drawn, _table(place, plan, known)))
    return found


def _plan(strengths: dict[str, dict[str, float]]) -> dict[int, dict[int, float]]:
    return {int(layer): {int(e): value for e, value in of.items()} for layer, of in strengths.items()}


def _table(place: Place, plan: dict[int, dict[int, float]], known: Sequence[str]) -> Table:
    layers: list[int] = place.value["layers"]
    ranks = {measure: _ranks(place.value[measure]) for measure in known}
    chosen = {(layers.index(layer), e) for layer, of in plan.items() if layer in layers for e in of}
    for of in ranks.values():
        chosen |= {spot for spot, rank in of.items() if rank <= SHOWN}
    last = 1 << 30
    order = sorted(chosen, key=lambda spot: (*(ranks[m].get(spot, last) for m in reversed(known)), spot))
    rows = tuple(
        (
            f"{layers[row]}:{expert}",
            (
                *(_value(place[measure], row, expert, ranks[measure]) for measure in known),
                text(_role(plan.get(layers[row], {}).get(expert))),
            ),
        )
        for row, expert in order
    )
    caption = (
        f"The first {SHOWN} experts by each measure (rank by size in parentheses) and those of the plan. The "
        "risk difference is what accompanies the behaviour; an effect what switching that expert alone does "
        "to d, in nats."
    )
    return Table(caption, ("layer:expert", *(MEASURES[measure] for measure in known), "in the plan"), rows)


def _value(values: Place, row: int, expert: int, ranks: dict[tuple[int, int], int]) -> Cell:
    rank = ranks.get((row, expert))
    return Cell((values[row][expert].number(change), "" if rank is None else f" ({rank})"))


def _role(value: float | None) -> str:
    if not value:
        return "no"
    return f"{'in' if value > 0 else 'out'} (λ {strength(value)})"


def _ranks(values: Sequence[Sequence[float | None]]) -> dict[tuple[int, int], int]:
    """(row, expert) → rank by size, from 1."""
    known = [
        (abs(value), (row, expert))
        for row, of in enumerate(values)
        for expert, value in enumerate(of)
        if value is not None
    ]
    order = np.argsort(ties.ranks([size for size, _ in known]), kind="stable")
    return {known[number][1]: rank for rank, number in enumerate(order, 1)}
