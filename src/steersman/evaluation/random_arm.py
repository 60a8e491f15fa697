"""The random control of any plan: plans of the same shape, other experts and other directions.

Experts are exchanged for others of the same layer and of like activation rate on the task's own prompts;
vectors for random ones of the same length. So what any edit of that size does is told from what this one
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from steersman.edits import Edit, ExpertEdit, ResidualEdit
from steersman.errors import PlanError
from steersman.evaluation.controls import TRIES, base_rates, exchanged, exchanges

if TYPE_CHECKING:
    from steersman.evaluation.arms import Subject
    from steersman.evaluation.tasks import Task
    from steersman.steering import Steering

MATCHED = (
    "other experts of the same layers, as many, of like activation rate on the same prompts, with the same "
    "strengths; random vectors of the same length at the same layers; the same tokens"
)
READ = 64
"""Prompts that activation rates are taken from."""


@dataclass(frozen=True)
class Drawn:
    """One random plan, and the reversed one with the same stand-ins where there is one."""

    toward: Steering
    back: Steering | None


def random_plans_like(
    subject: Subject, task: Task, toward: Steering, back: Steering | None, *, draws: int, seed: int
) -> list[Drawn]:
    """`draws` plans matched to a plan and its reverse.

    Raises PlanError where hardly any exchange keeps the routers' limits.
    """
    stand_ins = _stand_ins(subject, task, [plan for plan in (toward, back) if plan is not None], seed)
    found: list[Drawn] = []
    for number in range(draws):
        for tries in range(TRIES + 1):
            exchange = next(stand_ins)
            try:
                drawn = [None if plan is None else exchanged(plan, exchange) for plan in (toward, back)]
                break
            except PlanError:  # across the groups of a group-limited router
                if tries == TRIES:
                    raise PlanError(
                        f"{TRIES} random plans broke a router's limits: no random control"
                    ) from None
        directions = _Directions(seed, number)
        first, second = (None if plan is None else directions.put_in(plan) for plan in drawn)
        if first is not None:
            found.append(Drawn(first, second))
    return found


def _stand_ins(
    subject: Subject, task: Task, plans: Sequence[Steering], seed: int
) -> Iterator[dict[int, NDArray[np.intp]]]:
    if not any(isinstance(edit, ExpertEdit) for plan in plans for edit in plan.edits):
        while True:
            yield {}
    rows = [subject.encoded(item.content) for item in list(task)[:READ]]
    yield from exchanges(base_rates(subject.prompt_rates(rows)), seed)


class _Directions:
    """Random directions, one for each vector of a plan; the reverse gets the same with the sign changed."""

    def __init__(self, seed: int, number: int) -> None:
        self._seed = (seed, number)
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def put_in(self, plan: Steering) -> Steering:
        edits: list[Edit] = []
        for place, edit in enumerate(plan.edits):
            if isinstance(edit, ResidualEdit):
                vectors = {
                    layer: self._direction(place, layer, len(vector)) * vector.norm()
                    for layer, vector in edit.vectors.items()
                }
                edits.append(replace(edit, vectors=vectors))
            else:
                edits.append(edit)
        return replace(plan, edits=tuple(edits), provenance={"made": "random control"}, evidence=())

    def _direction(self, place: int, layer: int, width: int) -> torch.Tensor:
        if (place, layer) not in self._known:
            drawn = np.random.default_rng([*self._seed, place, layer]).standard_normal(width)
            self._known[place, layer] = torch.tensor(drawn / np.linalg.norm(drawn), dtype=torch.float32)
        return self._known[place, layer]
