"""Evidence attached to a saved plan: which evaluation was made of it, and what that found in brief."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steersman.errors import ArtifactError
from steersman.evaluation.evaluation_report.card import card_evidence
from steersman.evaluation.evaluation_report.numbers import change, in_points
from steersman.evaluation.evaluation_report.place import MISSING
from steersman.evaluation.report import p_value
from steersman.steering import Steering


def with_evidence(steering: str | Path, result: Mapping[str, Any]) -> Steering:
    """Write a saved plan anew, all at once, with an evaluation of it in its `evidence`.

    The edits and so the fingerprint stay as they are; an evaluation that is there already stays there once.

    Args:
        steering: The plan's folder.
        result: The evaluation, as in evaluation.json.

    Returns:
        The plan as it is written.

    Raises:
        ArtifactError: the evaluation is not of this plan, or the folder cannot be read or written.
    """
    plan = Steering.from_pretrained(steering)
    names = [of["name"] for of in result["steerings"] if of["fingerprint"] == plan.fingerprint]
    if not names:
        raise ArtifactError(
            f"{steering}: the evaluation is not of this plan "
            f"(it has none of fingerprint {plan.fingerprint[:16]}…)"
        )
    evidence = card_evidence(result, names[0])
    if any(isinstance(of, Mapping) and of.get("sha256") == evidence["sha256"] for of in plan.evidence):
        return plan
    plan = replace(plan, evidence=(*plan.evidence, evidence))
    plan.save_pretrained(steering, force=True)
    return plan


def evidence_in_words(evidence: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """What a plan's evidence says, a line for each evaluation and for each task and arm in it."""
    lines = []
    for entry in evidence:
        if isinstance(entry, str):
            lines.append(f"evaluated: {entry}")
            continue
        lines.append(f"evaluated {entry['created']} ({entry['sha256'][:16]}…):")
        lines += [f"  {_in_words(task)}" for task in entry["tasks"]]
    return lines


def _in_words(task: Mapping[str, Any]) -> str:
    form = in_points if task["kind"] == "rate" else change
    said = f"{task['task']}, {task['arm']}: {task['metric']} {_number(task['difference'], form)}"
    said += " points" if task["kind"] == "rate" else ""
    if task["low"] is not None and task["high"] is not None:
        said += f" (95% interval {form(task['low'])} to {form(task['high'])})"
    for name, key in (("p after Holm", "p_holm"), ("p among random plans", "random_p")):
        if task[key] is not None:
            said += f", {name} {p_value(task[key])}"
    return f"{said}; {task['items']} items" + (", side effect" if task["role"] == "side" else "")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return MISSING if value is None else form(value)
