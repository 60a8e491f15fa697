"""The few figures of the first screen, in large type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steersman.certainty import CANNOT_TELL, LEAST_CONTROLS, Control
from steersman.evaluation.concluded import family_of
from steersman.evaluation.evaluation_report.numbers import (
    Pieces,
    detectable,
    equals,
    estimate,
    p_piece,
)
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import arms_by
from steersman.evaluation.evaluation_report.verdicts import (
    ORDER,
    controls_of_plan,
    side_differences,
    uncertainty,
    verdict_on,
)

MOST = 3
"""Plans and tasks that have figures there; the chapters have all."""


@dataclass(frozen=True)
class KeyFigure:
    """One figure: what it is, its value, and how sure it is."""

    label: str
    value: Pieces
    note: Pieces


def key_figures(result: Place) -> list[KeyFigure]:
    """Effects from base to steered, random plans that do as much, side effects."""
    plans = arms_by(result, "steered")[:MOST]
    effects = [task for task in result["tasks"] if task.value["role"] == "effect"][:MOST]
    pairs = [(task, plan) for task in effects for plan in plans if plan in task.value["differences"]]
    return [
        *(_effect(result, task, plan) for task, plan in pairs),
        *(_random(task, plan, of) for task, plan in pairs for of in controls_of_plan(task, plan)),
        *(_side_effects(result, plan) for plan in plans if side_differences(result, plan)),
    ]


def _effect(result: Place, task: Place, plan: str) -> KeyFigure:
    metric = task.value["metrics"][0]
    base, own = (estimate(task["results"][arm].get(metric["name"])) for arm in ("base", plan))
    found = task["differences"][plan].get(metric["name"])
    verdict = verdict_on(result, task, plan).capitalize()
    note = (f"{verdict}: ", *uncertainty(found)) if found else (verdict,)
    return KeyFigure(f"“{metric['title']}”, base → {plan}", (*base, " → ", *own), note)


def _random(task: Place, plan: str, random: Place) -> KeyFigure:
    count = len(random.value["draws"])
    others = family_of(random.value).removesuffix(" of its shape")
    label = f"{others} that do as much as {plan} ({task.value['title']})"
    control = Control(count, random.value["p"])
    said = "" if control.beaten else "; cannot tell them apart"
    if not control.carries:
        said = f"; cannot tell: {LEAST_CONTROLS} are the least that can show anything"
    note: Pieces = ("p ", *equals(p_piece(random["p"])), said)
    return KeyFigure(label, (random["at_least"].number(str), f" of {count}"), note)


def _side_effects(result: Place, plan: str) -> KeyFigure:
    found = side_differences(result, plan)
    verdicts = [verdict_on(result, task, plan) for task, _ in found]
    value = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ORDER if verdict in verdicts)
    untold = [pair for pair, verdict in zip(found, verdicts, strict=True) if verdict == CANNOT_TELL]
    return KeyFigure(f"side effects of {plan}, by task", (value,), _least(untold))


def _least(found: Sequence[tuple[Place, Place]]) -> Pieces:
    """What could have been seen in each side task of which nobody can tell."""
    could = [detectable(task, task.value["metrics"][0]["name"], change) for task, change in found]
    pieces: Pieces = ()
    for place, of in enumerate(of for of in could if of):
        pieces = (*pieces, ", " if place else "so many items show ", *of)
    return pieces
