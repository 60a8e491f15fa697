"""The plan that a harness is given in one argument: PATH[@STRENGTH], several joined by +."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from steersman.errors import PlanError
from steersman.steering import Steering, compose

if TYPE_CHECKING:
    from torch import nn


def open_plan(given: str | Steering | None) -> Steering | None:
    """A plan from what follows `steering=`, such as `plans/safer@0.5+plans/honest`.

    What exists as it is written is a path, whatever signs are in it. None is no plan.

    Raises:
        PlanError: no path, a strength that is no number, plans that cannot be composed or scaled.
        ArtifactError: a folder that holds no readable steering.
    """
    if given is None or isinstance(given, Steering):
        return given
    text = str(given)
    parts = [text] if Path(text).exists() else text.split("+")
    plans = [_scaled(part.strip(), text) for part in parts]
    return plans[0] if len(plans) == 1 else compose(*plans)


def check_fits(plan: Steering | None, model: nn.Module, match: str) -> None:
    """Raise before the first item where a plan is for another model, or `match` is unknown.

    Raises ArchitectureMismatch, WeightsMismatch, PlanError.
    """
    from steersman.models.apply import check_model

    if match not in ("weights", "architecture"):
        raise PlanError(f"match={match!r} is unknown: use 'weights' or 'architecture'")
    if plan is not None and plan.edits:
        check_model(plan, model, match)  # type: ignore[arg-type]


def _scaled(part: str, whole: str) -> Steering:
    path, strength = part, 1.0
    if not Path(path).exists() and "@" in path:
        path, _, dial = path.rpartition("@")
        try:
            strength = float(dial)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise PlanError(f"steering={whole}: {dial!r} is no strength; right is a number such as 0.5")
    if not path:
        raise PlanError(f"steering={whole}: names no steering; right is PATH[@STRENGTH][+PATH…]")
    plan = Steering.from_pretrained(path)
    try:
        return plan if strength == 1.0 else strength * plan
    except PlanError as error:
        raise PlanError(f"steering={whole}: scaled by {strength:g}, {error}") from None
