"""Studies of one plan that holds both levers: what each part of it does, alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import Comparison, compare
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
        receipt: What was applied of `plan` while it answered the first items of the task that the vector is
            meant to move.
    """

    model: str
    plan: Steering
    of_experts: str
    of_vector: str
    comparisons: Mapping[str, Comparison]
    receipt: Mapping[str, Any]

    @property
    def moves_both(self) -> bool:
        """Whether the plan of both moves both tasks as it is meant to, each interval clear of 0."""
        experts, vector = (
            self.comparisons[name].differences[BOTH] for name in (self.of_experts, self.of_vector)
        )
        return experts.high < 0 and vector.low > 0

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "plan": self.plan.fingerprint,
            "of_experts": self.of_experts,
            "of_vector": self.of_vector,
            "comparisons": {name: found.to_json() for name, found in self.comparisons.items()},
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
) -> LeversStudy:
    """Measure expert edits, a vector and both together on what each is meant to move and on ordinary items.

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
        receipt=subject.receipt_of(of_vector[: subject.batch_size], both),
    )
