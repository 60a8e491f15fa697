"""Studies of one plan that holds both levers: what each part of it does, alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import Comparison, compare
from steersman.evaluation.random_arm import random_plans_like
from steersman.evaluation.statistics import RandomControl, random_control
from steersman.evaluation.tasks import Task

if TYPE_CHECKING:
    from steersman.steering import Steering

EXPERTS, VECTOR, BOTH = "experts", "vector", "both"


@dataclass(frozen=True)
class LeversStudy:
    """What expert edits, a vector, and the plan of both do to each task.

    Attributes:
        model: Its name.
        plan: Of both.
        of_experts, of_vector: The names of the tasks that the two parts are meant to move: the vector toward
            the positive side, the experts toward the negative one.
        comparisons: By task name.
        controls: By the names of those two tasks: what `plan` does to mean d, toward where it is meant to go,
            among random plans of its shape.
        receipt: What was applied of `plan` while it answered the first items of the task that the vector is
            meant to move.
    """

    model: str
    plan: Steering
    of_experts: str
    of_vector: str
    comparisons: Mapping[str, Comparison]
    controls: Mapping[str, RandomControl]
    receipt: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "plan": self.plan.fingerprint,
            "of_experts": self.of_experts,
            "of_vector": self.of_vector,
            "comparisons": {name: found.to_json() for name, found in self.comparisons.items()},
            "controls": {name: found.to_json() for name, found in self.controls.items()},
            "receipt": dict(self.receipt),
        }


def run_levers_study(
    subject: Subject,
    experts: Steering,
    vector: Steering,
    of_experts: Task,
    of_vector: Task,
    ordinary: Task,
    *,
    model: str,
    draws: int,
    seed: int,
    control_items: int | None = None,
) -> LeversStudy:
    """Measure expert edits, a vector and both together on what each is meant to move and on ordinary items;
    and both among `draws` random plans of their shape, on the first `control_items`.

    Raises PlanError where the two cannot be composed.
    """
    both = experts + vector
    arms = (Arm(EXPERTS, experts), Arm(VECTOR, vector), Arm(BOTH, both))
    return LeversStudy(
        model=model,
        plan=both,
        of_experts=of_experts.name,
        of_vector=of_vector.name,
        comparisons={task.name: compare(subject, task, arms) for task in (of_experts, of_vector, ordinary)},
        controls={
            task.name: _among_random(subject, task[:control_items], both, sign, draws=draws, seed=seed)
            for task, sign in ((of_experts, -1), (of_vector, 1))
        },
        receipt=subject.receipt_of(of_vector[: subject.batch_size], both),
    )


def _among_random(
    subject: Subject, task: Task, plan: Steering, sign: int, *, draws: int, seed: int
) -> RandomControl:
    """How far a plan moves mean d in a direction, and how far random plans of its shape do."""
    forks = subject.forks(task)
    base = float(subject.preference(forks, None).mean())

    def effect(of: Steering) -> float:
        return sign * (float(subject.preference(forks, of).mean()) - base)

    plans = random_plans_like(subject, task, plan, None, draws=draws, seed=seed)
    return random_control(effect(plan), [effect(drawn.toward) for drawn in plans])
