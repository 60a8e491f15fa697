"""What test items let one say of the candidate that was chosen: pure maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from steersman.certainty import CANNOT_TELL, NOT_RUN, SHOWN, Control, Verdict, verdict
from steersman.evaluation.statistics import (
    Groups,
    RandomControl,
    clustered_mean,
    paired_difference,
    random_control,
)
from steersman.evaluation.tuning.costs import Cost


def control_of(found: float, draws: Sequence[float]) -> RandomControl | None:
    """An effect among its controls' own; None where there were none."""
    return random_control(found, draws) if draws else None


def verdict_of(low: float, control: RandomControl | None, costs: Mapping[str, Cost]) -> Verdict:
    """Shown where the effect goes the way it was chosen for, clear of 0 by the lower end of its interval, is
    beyond its controls, and every cost is kept on test items too.
    """
    due = NOT_RUN if control is None else Control(len(control.draws), control.p)
    found = verdict(low, low, controls=[due]) if low > 0 else CANNOT_TELL
    return found if found != SHOWN or all(cost.kept for cost in costs.values()) else CANNOT_TELL


def answers_moved(
    before: ArrayLike, after: ArrayLike, groups: Groups, draws: Sequence[float], sign: float
) -> dict[str, Any]:
    """How far answers went to the side steered for, with the 95 % interval by group, beside the controls.

    Args:
        before, after: Of each item, unsteered and steered; 0 and 1, or other numbers.
        draws: The same means of controls, toward the side.
        sign: 1 toward the larger numbers, −1 toward the smaller.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if bool(np.isin([*first, *second], (0, 1)).all()):
        rates = paired_difference(first, second, groups)
        low, high = sorted((sign * rates.low, sign * rates.high))
    else:
        mean = clustered_mean(sign * (second - first), groups)
        low, high = mean.low, mean.high
    moved = sign * float(second.mean() - first.mean())
    control = control_of(moved, draws)
    return {
        "base": float(first.mean()),
        "steered": float(second.mean()),
        "moved": moved,
        "low": None if low != low else low,
        "high": None if high != high else high,
        "items": len(first),
        "control": None if control is None else control.to_json(),
        "verdict": verdict_of(low, control, {}),
    }
