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


def concluded(task: Mapping[str, Any], arm: Mapping[str, Any]) -> Verdict:
    """The verdict on what an arm does to a task's first metric.

    Args:
        task: One of the record's tasks.
        arm: One of the record's arms: its name and kind.
    """
    found = task["differences"].get(arm["name"], {}).get(task["metrics"][0]["name"])
    if not found:
        return CANNOT_TELL
    control = control_of(task, arm)
    return verdict_of(found, () if control is None else (control,))


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


def control_of(task: Mapping[str, Any], arm: Mapping[str, Any]) -> Control | None:
    """The random plans that an arm's effect stands among; None where none are due."""
    if task["role"] != "effect" or arm["kind"] not in OF_A_PLAN:
        return None
    for random in task["random"] or ():
        if arm["name"] in random["arms"]:
            return Control(len(random["draws"]), random["p"])
    return NOT_RUN
