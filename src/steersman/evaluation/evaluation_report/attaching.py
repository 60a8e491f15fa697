"""Evidence attached to a saved plan: which evaluation was made of it, and what that found in brief."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steersman.certainty import p_value
from steersman.errors import ArtifactError
from steersman.evaluation.concluded import verdict_of_brief
from steersman.evaluation.evaluation_report.card import card_evidence
from steersman.evaluation.evaluation_report.numbers import change, in_points
from steersman.evaluation.evaluation_report.place import MISSING
from steersman.showing import count_of, on_one_line
from steersman.steering import Steering


def with_evidence(steering: str | Path, result: Mapping[str, Any]) -> Steering:
    """Write a saved plan anew, all at once, with an evaluation of it in its `evidence`.

    The edits and so the fingerprint stay as they are; an evaluation that is there already stays there once.
    Where the plan ran at another strength (`PATH@0.5`), the strengths in the evidence are those.

    Args:
        steering: The plan's folder.
        result: The evaluation, as in evaluation.json.

    Returns:
        The plan as it is written.

    Raises:
        ArtifactError: the evaluation is not of this plan, or the folder cannot be read or written.
    """
    plan = Steering.from_pretrained(steering)
    dials = _dials(result, plan.fingerprint)
    if not dials:
        raise ArtifactError(
            f"{steering}: the evaluation is not of this plan "
            f"(it has none of fingerprint {plan.fingerprint[:16]}…)"
        )
    tasks = [
        {**task, "strength": task["strength"] * dial}
        for name, dial in dials.items()
        for task in card_evidence(result, name)["tasks"]
    ]
    evidence = {**card_evidence(result, next(iter(dials))), "tasks": tasks}
    if any(isinstance(of, Mapping) and of.get("sha256") == evidence["sha256"] for of in plan.evidence):
        return plan
    plan = replace(plan, evidence=(*plan.evidence, evidence))
    plan.save_pretrained(steering, force=True)
    return plan


def _dials(result: Mapping[str, Any], fingerprint: str) -> dict[str, float]:
    """The evaluation's names of a plan, with the strength each runs it at: 1, or what it was scaled by."""
    found = {}
    for of in result["steerings"]:
        made = of["provenance"]
        if of["fingerprint"] == fingerprint:
            found[of["name"]] = 1.0
        elif made.get("made") == "scaled" and made["from"][0].get("fingerprint") == fingerprint:
            found[of["name"]] = float(made["factor"])
    return found


def evidence_in_words(evidence: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """What a plan's evidence says, a line for each evaluation and for each task and arm in it."""
    lines = []
    for entry in on_one_line(evidence):
        if isinstance(entry, str):
            lines.append(f"evaluated: {entry}")
            continue
        lines.append(f"evaluated {entry['created']} ({entry['sha256'][:16]}…):")
        lines += [f"  {_in_words(task)}" for task in entry["tasks"]]
    return lines


def _in_words(task: Mapping[str, Any]) -> str:
    form = in_points if task["kind"] == "rate" else change
    said = f"{verdict_of_brief(task)}: {task['task']}, {task['arm']}: {task['metric']} "
    said += _number(task["difference"], form)
    said += " points" if task["kind"] == "rate" else ""
    if task["low"] is not None and task["high"] is not None:
        said += f" (95% interval {form(task['low'])} to {form(task['high'])})"
    for name, key in (("p after Holm", "p_holm"), ("p among drawn plans", "random_p")):
        if task[key] is not None:
            said += f", {name} {p_value(task[key])}"
    return f"{said}; {count_of(task['items'], 'item')}" + (", side effect" if task["role"] == "side" else "")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return MISSING if value is None else form(value)
