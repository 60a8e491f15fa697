"""What the chosen sets change elsewhere: other behaviours and ordinary prompts, by what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.judges import OUTCOMES
from steersman.evaluation.screening.ledger import Ledger
from steersman.evaluation.statistics import paired_difference, rate
from steersman.evaluation.tasks import Task
from steersman.experts.causal import CausalScreen
from steersman.experts.causal_effects import DIRECTIONS, Bools
from steersman.models.reading import evaluating

if TYPE_CHECKING:
    from steersman.steering import Steering


def harm_of(
    subject: Subject,
    screen: CausalScreen,
    tasks: Sequence[Task],
    ledger: Ledger,
    bar: tqdm[Any],
) -> tuple[dict[str, Any], ...]:
    """Of each task and direction: the positive side's rate unsteered, steered, and the paired difference with
    its interval.
    """
    plans = {
        direction: screen.select(reverse=direction == "reversed")
        for direction in DIRECTIONS
        if screen.found and direction in screen.sets and screen.sets[direction].picks
    }
    bar.total = len(tasks) * (1 + len(plans)) if plans else 0
    found: list[dict[str, Any]] = []
    for number, task in enumerate(tasks if plans else ()):

        def on(name: str, plan: Steering | None, task: Task = task, number: int = number) -> Bools:
            def work() -> npt.NDArray[np.int64]:
                with evaluating(subject.model):
                    outcomes = subject.run(task, Arm(name, plan)).outcomes
                return np.array([OUTCOMES.index(side) for side in outcomes])

            bar.update()
            outcomes = ledger.remember(f"harm, task {number}, {name}", work)
            return np.asarray(outcomes == OUTCOMES.index("positive"))

        base = on("base", None)
        for direction, plan in plans.items():
            steered = on(direction, plan)
            found.append(
                {
                    "task": task.name,
                    "direction": direction,
                    "side": task.behaviour.positive,
                    "items": len(task),
                    "base": rate(base, task.groups).to_json(),
                    "steered": rate(steered, task.groups).to_json(),
                    "difference": paired_difference(base, steered, task.groups).to_json(),
                }
            )
    return tuple(found)
