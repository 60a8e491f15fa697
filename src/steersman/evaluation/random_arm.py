"""The drawn controls of any plan: plans of the same shape, with other experts and other vectors.

Experts are exchanged for others of the same layer and of like activation rate on the task's own prompts.
Vectors are exchanged, at the same layer, length and tokens, for such as are drawn like the model's states on
those prompts (what any push along directions that the model uses does), or for label-shuffled concepts (what
the same pairs give without what they are about). So what any edit of that size does is told from what this
one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.edits import Edit, ExpertEdit, ResidualEdit, residual_edits
from steersman.errors import PlanError
from steersman.evaluation.controls import TRIES, base_rates, exchanged, exchanges

if TYPE_CHECKING:
    from steersman.evaluation.arms import Subject
    from steersman.evaluation.tasks import Task
    from steersman.evaluation.vector_controls import ShuffledConcepts
    from steersman.steering import Steering

READ = 64
"""Prompts that activation rates and states are taken from."""

StandIn = Callable[[int, int, int, Tensor], Tensor]
"""(number of the draw, place of the edit in its plan, layer, the plan's vector) → a vector [width] instead of
it, of any length."""


@dataclass(frozen=True)
class Drawn:
    """One drawn plan, and the reversed one with the same stand-ins where there is one."""

    toward: Steering
    back: Steering | None


def random_plans_like(
    subject: Subject,
    task: Task,
    toward: Steering,
    back: Steering | None,
    *,
    draws: int,
    seed: int,
    shuffled: ShuffledConcepts | None = None,
) -> list[Drawn]:
    """`draws` plans matched to a plan and its reverse; the first of more are the same. With `shuffled` their
    vectors are label-shuffled concepts, else drawn like the model's states.

    Raises PlanError where hardly any exchange keeps the routers' limits.
    """
    plans = [plan for plan in (toward, back) if plan is not None]
    rows = [subject.encoded(item.content) for item in list(task)[:READ]]
    stand_ins = _other_experts(subject, rows, plans, seed)
    vectors = _of_shuffled(shuffled) if shuffled else _other_vectors(subject, rows, plans, draws, seed)
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
        instead = _Instead(vectors, number)
        first, second = (None if plan is None else instead.put_in(plan) for plan in drawn)
        if first is not None:
            found.append(Drawn(first, second))
    return found


def matched(subject: Subject, plan: Steering, *, shuffled: bool) -> str:
    """How such plans are like a plan, in words."""
    parts = []
    if any(isinstance(edit, ExpertEdit) for edit in plan.edits):
        parts.append(
            "other experts of the same layers, as many, of like activation rate on the same prompts, with "
            "the same strengths"
        )
    if residual_edits(plan.edits):
        if shuffled:
            drawn = "concepts of the same pairs with shuffled labels, through the same map where there is one"
        elif subject.gives_states:
            drawn = "random vectors drawn like the model's states on the same prompts"
        else:
            drawn = "isotropic random vectors (an engine gives no states to draw them like)"
        parts.append(f"{drawn}, of the same length at the same layers")
    return "; ".join([*parts, "the same tokens"])


def _other_experts(
    subject: Subject, rows: Sequence[Sequence[int]], plans: Sequence[Steering], seed: int
) -> Iterator[dict[int, NDArray[np.intp]]]:
    if not any(isinstance(edit, ExpertEdit) for plan in plans for edit in plan.edits):
        while True:
            yield {}
    yield from exchanges(base_rates(subject.prompt_rates(rows)), seed)


def _other_vectors(
    subject: Subject, rows: Sequence[Sequence[int]], plans: Sequence[Steering], draws: int, seed: int
) -> StandIn:
    """Each edit of a plan has vectors of its own, so that a plan of two does not draw one twice."""
    places = max(len(plan.edits) for plan in plans)
    layers = sorted({layer for plan in plans for edit in residual_edits(plan.edits) for layer in edit.layers})
    if not layers or not subject.gives_states:
        return lambda number, place, layer, own: torch.from_numpy(
            np.random.default_rng([seed, number, place, layer]).standard_normal(len(own))
        )
    drawn = subject.state_vectors(rows, layers, draws * places, seed)
    return lambda number, place, layer, _: drawn[layer][number * places + place]


def _of_shuffled(shuffled: ShuffledConcepts) -> StandIn:
    def vector(number: int, _place: int, layer: int, own: Tensor) -> Tensor:
        found = shuffled.instead_of(layer, own)
        if found is None:
            raise PlanError(f"the vector at layer {layer} is of none of the concepts given")
        return found[number]

    return vector


class _Instead:
    """One draw: a stand-in for each vector of a plan, as long, and for that of its reverse the same the other
    way round.
    """

    def __init__(self, vectors: StandIn, number: int) -> None:
        self._vectors = vectors
        self._number = number
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def put_in(self, plan: Steering) -> Steering:
        edits: list[Edit] = [
            replace(
                edit, vectors={layer: self._for(place, layer, own) for layer, own in edit.vectors.items()}
            )
            if isinstance(edit, ResidualEdit)
            else edit
            for place, edit in enumerate(plan.edits)
        ]
        return replace(plan, edits=tuple(edits), provenance={"made": "random control"}, evidence=())

    def _for(self, place: int, layer: int, own: Tensor) -> Tensor:
        exact = own.double()
        if (place, layer) not in self._known:
            drawn = self._vectors(self._number, place, layer, own).double()
            self._known[place, layer] = exact, drawn / drawn.norm()
        first, unit = self._known[place, layer]
        sign = -1 if float(first @ exact) < 0 else 1
        return sign * float(exact.norm()) * unit.float()
