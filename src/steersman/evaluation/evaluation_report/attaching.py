"""Evidence attached to a saved plan: which evaluation was made of it, and what that found in brief."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from steersman.errors import ArtifactError
from steersman.evaluation.evaluation_report.card import card_evidence
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
