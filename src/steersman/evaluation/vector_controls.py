"""Controls of a vector: other vectors at the same layer and tokens.

What any push as long does (random vectors, drawn like the model's own states); what the same way does with
shuffled labels (label-shuffled concepts through the same map, at the same strength; and stretched until they
are as long, which makes much of little: where pairs are matched, what differs between them lies along the
concept itself); what the source's vector does as it is (unmapped); and what the target's own vector does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steersman.concepts.controls import like_states
from steersman.edits import ResidualEdit
from steersman.errors import PlanError
from steersman.evaluation.statistics import RandomControl, random_control

if TYPE_CHECKING:
    from steersman.concepts.affine_map import AffineMap
    from steersman.concepts.concept import ConceptVector
    from steersman.evaluation.arms import Subject
    from steersman.evaluation.tasks import Task
    from steersman.steering import Steering


@dataclass(frozen=True)
class DrawnControl:
    """What many drawn vectors did, each on the same items.

    Attributes:
        name: Of the control.
        control: The plan's share of items on the positive side among the draws' (p is one-sided).
        items: Items that each draw was asked.
        right, refused: Mean shares of ordinary items answered right, and refused, over the draws.
        ordinary_items: Ordinary items that each draw was asked.
    """

    name: str
    control: RandomControl
    items: int
    right: float
    refused: float
    ordinary_items: int

    def to_json(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "ordinary": {"items": self.ordinary_items, "right": self.right, "refused": self.refused},
            **self.control.to_json(),
        }


def with_vector(plan: Steering, vector: Tensor, made: str, *, as_long: bool = True) -> Steering:
    """The same plan with another vector [width], as long as the plan's own; or at the plan's own strength.

    Raises PlanError for a plan that is not one vector that is added at one layer.
    """
    edit = plan.edits[0]
    if len(plan.edits) != 1 or not isinstance(edit, ResidualEdit) or len(edit.layers) != 1:
        raise PlanError("a control is for a plan of one vector at one layer")
    (layer,) = edit.layers
    if not as_long:
        same = replace(edit, vectors={layer: vector})
        return replace(plan, edits=(same,), provenance={"made": made}, evidence=())
    length = abs(edit.strength) * float(edit.vectors[layer].double().norm())
    exact = vector.double()
    other = replace(edit, vectors={layer: (length / exact.norm() * exact).float()}, strength=1.0)
    return replace(plan, edits=(other,), provenance={"made": made}, evidence=())


def random_vectors(bridge: AffineMap, layer: int, draws: int, seed: int) -> list[Tensor]:
    """Random vectors like the target's states at a layer, by the map's held-out rows."""
    return list(like_states(bridge.layer_map(layer).held_out.yy, draws, seed))


def shuffled_vectors(bridge: AffineMap, concept: ConceptVector, layer: int, draws: int) -> list[Tensor]:
    """Label-shuffled concepts through the same map."""
    place = concept.layers.index(bridge.layer_map(layer).source_layer)
    return [bridge.map_vector(layer, vector[place]) for vector in concept.shuffled[:draws]]


def unmapped_vector(bridge: AffineMap, concept: ConceptVector, layer: int) -> Tensor:
    """The source's vector as it is: cut off, or filled up with zeros, to the target's width."""
    vector = concept.vectors[bridge.layer_map(layer).source_layer]
    filled = torch.zeros(bridge.architecture.hidden_size)
    common = min(len(vector), len(filled))
    filled[:common] = vector[:common]
    return filled


def drawn_control(
    subject: Subject,
    plan: Steering,
    vectors: Sequence[Tensor],
    name: str,
    task: Task,
    ordinary: Task,
    *,
    as_long: bool = True,
    advance: Callable[[int], object] = lambda _: None,
) -> DrawnControl:
    """Steer with each vector in the plan's place (see `with_vector`). `advance(1)` is called after each."""
    observed = _share(subject, task, plan, "positive")
    shares, right, refused = [], [], []
    for vector in vectors:
        drawn = with_vector(plan, vector, f"control: {name}", as_long=as_long)
        shares.append(_share(subject, task, drawn, "positive"))
        outcomes = ordinary.judge(subject.generate(ordinary, drawn))
        right.append(outcomes.count("positive") / len(outcomes))
        refused.append(outcomes.count("negative") / len(outcomes))
        advance(1)
    return DrawnControl(
        name=name,
        control=random_control(observed, shares),
        items=len(task),
        right=sum(right) / len(right),
        refused=sum(refused) / len(refused),
        ordinary_items=len(ordinary),
    )


def _share(subject: Subject, task: Task, plan: Steering, side: str) -> float:
    outcomes = task.judge(subject.generate(task, plan))
    return sum(outcome == side for outcome in outcomes) / len(outcomes)
