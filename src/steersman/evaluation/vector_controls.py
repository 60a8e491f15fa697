"""Controls of a vector: other vectors at the same layer and tokens.

What any push as long does (random vectors, drawn like the model's own states); what the same way does with
shuffled labels (label-shuffled concepts through the same map, at the same strength; and stretched until they
are as long, which makes much of little: where pairs are matched, what differs between them lies along the
concept itself); what the source's vector does as it is (unmapped); and what the target's own vector does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steersman.concepts.controls import like_states
from steersman.edits import ResidualEdit, residual_edits
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
    bridge = bridge.of_concept(concept)
    place = concept.layers.index(bridge.layer_map(layer).source_layer)
    return [bridge.map_vector(layer, vector[place]) for vector in concept.shuffled[:draws]]


@dataclass(frozen=True)
class ShuffledConcepts:
    """The concepts that plans were made of, and the maps that carried them: their label-shuffled concepts
    stand in for the plans' vectors.
    """

    concepts: tuple[ConceptVector, ...]
    bridges: tuple[AffineMap, ...] = ()

    def instead_of(self, layer: int, vector: Tensor) -> Tensor | None:
        """The label-shuffled concepts, [draws, width], of the concept that a plan's vector [width] at a layer
        is, in its own model or through a map; None where it is of none of them.
        """
        for concept in self.concepts:
            own = concept.vectors.get(layer)
            if own is not None and _along(own, vector):
                return concept.shuffled[:, concept.layers.index(layer)]
            for bridge in (bridge.of_concept(concept) for bridge in self.bridges):
                if layer not in bridge.maps or bridge.source.architecture.id != concept.architecture.id:
                    continue
                own = concept.vectors.get(bridge.maps[layer].source_layer)
                if own is not None and _along(bridge.map_vector(layer, own), vector):
                    return torch.stack(shuffled_vectors(bridge, concept, layer, len(concept.shuffled)))
        return None

    def count_for(self, *plans: Steering) -> int:
        """How many there are for all vectors of a plan, and of its reverse: 0 where there are no vectors, or
        none is of these concepts.

        Raises PlanError where some of the vectors are and others are not.
        """
        edits = [edit for plan in plans for edit in residual_edits(plan.edits)]
        found = [(at, self.instead_of(at, vector)) for edit in edits for at, vector in edit.vectors.items()]
        known = [len(vectors) for _, vectors in found if vectors is not None]
        if known and len(known) < len(found):
            missing = next(layer for layer, vectors in found if vectors is None)
            raise PlanError(
                f"the vector at layer {missing} is of none of the concepts given: name all that the "
                "steering was made of, and the maps that carried them"
            )
        return min(known, default=0)

    def check(self, plans: Sequence[Sequence[Steering]]) -> None:
        """Raise PlanError where no plan (with its reverse) is of these concepts, or one has no shuffles."""
        for concept in self.concepts:
            if not len(concept.shuffled):
                raise PlanError(
                    f"the concept of {concept.model or 'a model'} has no label-shuffled concepts: refine it "
                    "again, of pairs of several groups"
                )
        counts = [self.count_for(*both) for both in plans]
        if self.concepts and not any(counts):
            raise PlanError(
                "no steering holds a vector of the concept: right is the one that it was made of, with the "
                "map where it was transplanted"
            )
        if self.bridges and not self.concepts:
            raise PlanError("a map is given without the concept that it carried")

    def told(self) -> list[dict[str, Any]]:
        """What they are, for the record of a run."""
        return [
            {
                **concept.provenance(),
                "shuffled": len(concept.shuffled),
                "unit_sums_sha256": hashlib.sha256(
                    concept.unit_sums.numpy().astype("<f4").tobytes()
                ).hexdigest(),
            }
            for concept in self.concepts
        ]


def _along(known: Tensor, vector: Tensor) -> bool:
    """Whether a plan's vector is a known one, up to its length, its sign and float32's rounding."""
    if known.shape != vector.shape:
        return False
    cosine = torch.nn.functional.cosine_similarity(known.double(), vector.double(), dim=0)
    return abs(float(cosine)) > 1 - 1e-6


def unmapped_vector(bridge: AffineMap, concept: ConceptVector, layer: int) -> Tensor:
    """The source's vector as it is: cut off, or filled up with zeros, to the target's width."""
    vector = concept.vectors[bridge.of_concept(concept).layer_map(layer).source_layer]
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
