"""What is drawn beside a plan of vectors: as long, at the same layers, its reverse the other way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from concepts import twins
from experts.test_counting import WORDS, tokenizer
from steersman.concepts.transplant import transplant
from steersman.errors import PlanError
from steersman.evaluation.arms import Subject
from steersman.evaluation.judges import Unjudged
from steersman.evaluation.random_arm import matched, random_plans_like
from steersman.evaluation.tasks import Behaviour, Item, Task
from steersman.evaluation.vector_controls import ShuffledConcepts
from steersman.steering import Steering

PROMPTS = [" ".join(WORDS[at : at + 4]) for at in range(8)]
TASK = Task(
    "own",
    [Item(str(n), str(n), prompt, WORDS[0], WORDS[1], "") for n, prompt in enumerate(PROMPTS)],
    Behaviour("", "", "", "", Unjudged()),
)


def subject_of(model: Any) -> Subject:
    return Subject(model, tokenizer())


def draws(plan: Steering, back: Steering | None = None, count: int = 3, **options: Any) -> list[Any]:
    return random_plans_like(subject_of(twins.source()), TASK, plan, back, draws=count, seed=5, **options)


def vectors_of(plan: Steering) -> list[torch.Tensor]:
    return [vector for edit in plan.edits for vector in edit.vectors.values()]  # type: ignore[union-attr]


def test_random_vectors_are_drawn_like_states_and_as_long() -> None:
    first = Steering.from_vectors(twins.source(), {0: [1.0] * 32, 2: [-2.0] * 32}, strength=0.3)
    plan = first + Steering.from_vectors(twins.source(), {2: [1.0] * 32}, scope="prompt")
    back = plan.reversed()
    known = subject_of(twins.source()).state_vectors(
        [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS], [0, 2], 6, 5
    )
    for number, drawn in enumerate(draws(plan, back)):
        for place, (own, other, reverse) in enumerate(
            zip(plan.edits, drawn.toward.edits, drawn.back.edits, strict=True)
        ):
            assert (other.strength, other.scope, other.layers) == (own.strength, own.scope, own.layers)
            for layer, vector in own.vectors.items():
                length = float(vector.norm())
                torch.testing.assert_close(
                    other.vectors[layer], length * known[layer][2 * number + place], rtol=1e-4, atol=1e-5
                )
                # Changing signs changes the strength alone: the vector is the same.
                assert torch.equal(reverse.vectors[layer], other.vectors[layer])
    again = draws(plan, back, count=5)
    for few, many in zip(draws(plan, back), again, strict=False):
        for one, other in zip(vectors_of(few.toward), vectors_of(many.toward), strict=True):
            torch.testing.assert_close(one, other)


def test_a_reverse_whose_vector_points_the_other_way_is_drawn_the_other_way() -> None:
    plan = Steering.from_vectors(twins.source(), {1: [1.0] * 32})
    back = Steering.from_vectors(twins.source(), {1: [-3.0] * 32})
    for drawn in draws(plan, back):
        (toward,), (away,) = vectors_of(drawn.toward), vectors_of(drawn.back)
        torch.testing.assert_close(-3 * toward, away)


def test_label_shuffled_concepts_stand_in_at_the_same_layer_and_length() -> None:
    concept = twins.concept()
    plan = 0.5 * concept.steering("dose:0.3", layers=1)
    shuffled = ShuffledConcepts((concept,))
    assert shuffled.count_for(plan) == len(concept.shuffled)
    for number, drawn in enumerate(draws(plan, shuffled=shuffled)):
        (own,), (other,) = vectors_of(plan), vectors_of(drawn.toward)
        expected = concept.shuffled[number, concept.layers.index(1)]
        assert float(other.norm()) == pytest.approx(float(own.norm()), rel=1e-5)
        assert float(torch.cosine_similarity(expected, other, dim=0)) == pytest.approx(1, abs=1e-5)
        assert drawn.toward.edits[0].strength == plan.edits[0].strength


def test_through_a_map_they_are_carried_as_the_concept_was() -> None:
    concept, bridge = twins.concept(), twins.bridge()
    plan = transplant(bridge, concept, "dose:0.3", layers=[2], force=True)
    shuffled = ShuffledConcepts((concept,), (bridge,))
    (vector,) = vectors_of(plan)
    carried = shuffled.instead_of(2, vector)
    assert carried is not None
    source = bridge.maps[2].source_layer
    expected = bridge.map_vector(2, concept.shuffled[4, concept.layers.index(source)])
    torch.testing.assert_close(carried[4], expected)
    assert ShuffledConcepts((concept,)).count_for(plan) == 0


def test_what_is_no_concept_of_a_plan_is_said() -> None:
    concept = twins.concept()
    by_hand = Steering.from_vectors(twins.source(), {1: [1.0] * 32})
    both = concept.steering(1.0, layers=1) + Steering.from_vectors(twins.source(), {2: [1.0] * 32})
    without = replace(concept, unit_sums=concept.unit_sums[:0])
    for concepts, bridges, plans, said in (
        ((concept,), (), [[by_hand]], "no steering holds a vector of the concept"),
        ((concept,), (), [[both]], "the vector at layer 2 is of none of the concepts given"),
        ((concept,), (), [[concept.steering(1.0, layers=1), by_hand]], "layer 1 is of none of the concepts"),
        ((without,), (), [[concept.steering(1.0, layers=1)]], "has no label-shuffled concepts"),
        ((), (twins.bridge(),), [[by_hand]], "without the concept that it carried"),
    ):
        with pytest.raises(PlanError, match=said):
            ShuffledConcepts(concepts, bridges).check(plans)
    ShuffledConcepts((concept,)).check([[by_hand], [concept.steering(1.0, layers=1)]])
    assert "shuffled labels" in matched(subject_of(twins.source()), by_hand, shuffled=True)
    assert "like the model's states" in matched(subject_of(twins.source()), by_hand, shuffled=False)
