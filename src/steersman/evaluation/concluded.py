"""What an evaluation's figures let one say of an arm: one of the three verdicts, from the record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.certainty import (
    CANNOT_TELL,
    LEAST_CONTROLS,
    MARGIN,
    NOT_RUN,
    Control,
    Verdict,
    verdict,
)

OF_A_PLAN = ("steered", "reversed", "strength")
"""Kinds of arms that say something of a plan alone, so that random plans of its shape are due beside them."""

FAMILIES = {"random": "random plans of its shape", "shuffled": "label-shuffled concepts"}
"""What plans are drawn beside a plan, each a control of its own: family → what its draws are called."""


def family_of(control: Mapping[str, Any]) -> str:
    """What a control's draws are called; before there were families all were random."""
    return FAMILIES[control.get("family", "random")]


def concluded(task: Mapping[str, Any], arm: Mapping[str, Any]) -> Verdict:
    """The verdict on what an arm does to a task's first metric.

    Args:
        task: One of the record's tasks.
        arm: One of the record's arms: its name and kind.
    """
    found = task["differences"].get(arm["name"], {}).get(task["metrics"][0]["name"])
    if not found:
        return CANNOT_TELL
    return verdict_of(found, controls_of(task, arm))


def verdict_of(
    found: Mapping[str, Any], controls: Sequence[Control] = (), *, margin: float | None = None
) -> Verdict:
    """The verdict on one difference of the record; `margin`: where it is not that of its kind."""
    p = found["p"] if found.get("p_holm") is None else found["p_holm"]
    if p is None:
        return CANNOT_TELL
    margin = margin_of(found) if margin is None else margin
    return verdict(found["low"], found["high"], margin=margin, p=p, controls=controls)


def verdict_of_brief(brief: Mapping[str, Any]) -> Verdict:
    """The verdict on one task and arm of a plan's evidence."""
    controls: tuple[Control, ...] = ()
    if brief["role"] == "effect" and brief["arm_kind"] in OF_A_PLAN:
        # How many random plans there were is not kept; a p that small takes enough of them.
        p = brief["random_p"]
        controls = (NOT_RUN if p is None else Control(LEAST_CONTROLS, p),)
    return verdict_of(brief, controls, margin=MARGIN if brief["kind"] == "rate" else None)


def margin_of(found: Mapping[str, Any]) -> float | None:
    """Inside ± this a difference counts as none; None where no margin is stated: of what is no share."""
    return MARGIN if "only_first" in found else None


def controls_of(task: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[Control, ...]:
    """The drawn plans that an arm's effect stands among, a control a family; none where none are due."""
    if task["role"] != "effect" or arm["kind"] not in OF_A_PLAN:
        return ()
    found = [of for of in task["random"] or () if arm["name"] in of["arms"]]
    return tuple(Control(len(of["draws"]), of["p"]) for of in found) or (NOT_RUN,)
