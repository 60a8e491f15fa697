"""Plans: composing, scaling, reversing, conflicts, limits across scopes, fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import families
from steersman import Architecture, ExpertEdit, PlanError, Router, Steering, compose
from steersman.edits import SCOPES, ResidualEdit, effective_strengths
from steersman.steering import canonical_json

ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    hidden_size=32,
    layers=(
        None,
        Router(1, 8, 2, "softmax-topk+renormalised"),
        Router(2, 8, 2, "sigmoid-topk+bias+groups-top2", groups=(4, 2), shared_experts=1),
        Router(3, 8, 2, "unknown", reason="the routing rule of Novel is not known"),
    ),
)


def plan(strengths: dict[int, dict[int, float]], scope: str = "all", **options: object) -> Steering:
    edits = (ExpertEdit(strengths, scope),)
    return Steering(edits, **{"architecture": ARCHITECTURE, "weights_id": "w" * 64, **options})


# --------------------------------------------------------------------------- fingerprints


def test_fingerprint_of_a_plan_made_by_hand() -> None:
    """Literal: whoever changes the canonical form changes the identity of every plan that was ever made."""
    by_hand = plan({2: {7: -1}, 1: {5: 0.5, 3: 1}}) + plan({1: {6: -0.25}}, "answer")
    form = {
        "architecture": hashlib.sha256(
            b'{"layers":[null,["softmax-topk+renormalised",8,2,null],'
            b'["sigmoid-topk+bias+groups-top2",8,2,[4,2]],["unknown",8,2,null]],'
            b'"model_type":"qwen3_moe","width":32}'
        ).hexdigest(),
        "edits": [
            {
                "layers": [1, 2],
                "operation": "bound",
                "point": "router",
                "scope": "all",
                "strengths": [[1, 3, 1.0], [1, 5, 0.5], [2, 7, -1.0]],
                "when": "always",
            },
            {
                "layers": [1],
                "operation": "bound",
                "point": "router",
                "scope": "answer",
                "strengths": [[1, 6, -0.25]],
                "when": "always",
            },
        ],
    }
    text = json.dumps(form, sort_keys=True, separators=(",", ":"))
    assert by_hand.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert by_hand.fingerprint == "75f96173fafd7beb0c7bb0e0927ee54af65a8c5080b812605b7449f0b6e5c61a"


def test_fingerprint_is_of_the_architecture_and_edits_alone() -> None:
    base = plan({1: {5: 1.0}})
    same = [
        plan({1: {5: 1}}),
        plan({1: {5: np.float64(1)}}),
        plan({1: {5: 1.0}, 2: {}}),
        plan({1: {5: 1.0}}, weights_id="v" * 64, model="other", revision="r", provenance={"made": "x"}),
        plan({1: {5: 1.0}}, on_conflict="sum", evidence=("e",)),
    ]
    assert {other.fingerprint for other in same} == {base.fingerprint}
    different = [
        plan({1: {5: 0.5}}),
        plan({1: {5: -1.0}}),
        plan({1: {4: 1.0}}),
        plan({2: {5: 1.0}}),
        plan({1: {5: 1.0}}, "prompt"),
        plan({1: {5: 1.0, 4: 0.0}}),
        plan({1: {5: 0.5}}) + plan({1: {5: 0.5}}),
        plan({}),
        plan(
            {1: {5: 1.0}},
            architecture=Architecture("mixtral", ARCHITECTURE.hidden_size, ARCHITECTURE.layers),
        ),
    ]
    assert len({other.fingerprint for other in [base, *different]}) == len(different) + 1


def test_key_order_and_negative_zero_do_not_matter() -> None:
    first = plan({1: {5: 0.5, 3: 0.0}, 2: {1: -1.0}})
    second = plan({2: {1: -1.0}, 1: {3: -0.0, 5: 0.5}})
    assert first.fingerprint == second.fingerprint
    assert first.edits == second.edits
    assert math.copysign(1, second.edits[0].strengths[1][3]) == 1
    assert (-1 * plan({1: {3: 0.0}})).fingerprint == plan({1: {3: 0.0}}).fingerprint
    assert plan({1: {3: 0.0}}).reversed().fingerprint == plan({1: {3: 0.0}}).fingerprint


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5, 1e-7], "a": "ä"}) == '{"a":"ä","b":[1,2.5,1e-07]}'
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            canonical_json(value)


# --------------------------------------------------------------------------- composition


def test_sum_concatenates_in_order() -> None:
    first, second = plan({1: {5: 0.5}}), plan({1: {3: 0.5}}, "answer")
    both = first + second
    assert both.edits == first.edits + second.edits
    assert (second + first).edits == second.edits + first.edits
    assert both.strengths == {1: {3: 0.5, 5: 0.5}}
    assert (plan({1: {5: 0.75}}) + plan({1: {5: 0.75}}, "prompt")).strengths == {1: {5: 1.0}}
    assert compose(first).edits == first.edits
    with pytest.raises(PlanError, match="nothing to compose"):
        compose()
    with pytest.raises(PlanError, match=r"a Steering is wanted, not 1 \(int\)"):
        _ = first + 1
    assert both.evidence == ()


def test_scaling_multiplies_strengths() -> None:
    base = plan({1: {5: 1.0, 3: -0.5}})
    assert (0.5 * base).strengths == (base * 0.5).strengths == {1: {3: -0.25, 5: 0.5}}
    assert (0 * base).strengths == {1: {3: 0.0, 5: 0.0}}
    assert (-1 * base).strengths == base.reversed().strengths == {1: {3: 0.5, 5: -1.0}}
    with pytest.raises(PlanError, match="expert 5 of layer 1 has strength 2: it must lie between -1 and 1"):
        _ = 2 * base
    for factor in (math.nan, math.inf):
        with pytest.raises(PlanError, match="is not a finite number"):
            _ = factor * base
    for factor in (True, "2", None):
        with pytest.raises(PlanError, match="factor is a number, not"):
            _ = factor * base  # type: ignore[operator]


def test_another_scope_for_all_edits() -> None:
    both = plan({1: {5: 1.0}}, "prompt") + plan({1: {3: -1.0}}, "answer")
    everywhere = both.with_scope("all")
    assert [edit.scope for edit in everywhere.edits] == ["all", "all"]
    assert everywhere.strengths == both.strengths
    assert everywhere.provenance["made"] == "rescoped"
    assert everywhere.provenance["from"][0]["fingerprint"] == both.fingerprint
    with pytest.raises(PlanError, match="scope 'some' is unknown"):
        both.with_scope("some")  # type: ignore[arg-type]
    apart = plan({1: {5: 1.0}}, "prompt") + plan({1: {5: -1.0}}, "generated")
    with pytest.raises(PlanError, match="layer 1, expert 5: one edit activates it"):
        apart.with_scope("all")


def test_reversed_is_refused_where_it_breaks_a_limit() -> None:
    base = plan({1: {0: -1.0, 1: -1.0, 2: -1.0}})
    with pytest.raises(PlanError, match="layer 1: 3 experts activated"):
        base.reversed()
    twice = plan({1: {0: -1.0, 3: 1.0}}, "answer").reversed()
    assert twice.reversed().fingerprint == plan({1: {0: -1.0, 3: 1.0}}, "answer").fingerprint
    assert twice.edits[0].scope == "answer"


def test_plans_for_different_models_do_not_add_up() -> None:
    other = plan({1: {5: 1.0}}, architecture=Architecture("mixtral", 32, ARCHITECTURE.layers))
    with pytest.raises(PlanError, match="different architectures"):
        _ = plan({1: {5: 1.0}}) + other
    with pytest.raises(PlanError, match="different weights"):
        _ = plan({1: {5: 1.0}}) + plan({1: {5: 1.0}}, weights_id="v" * 64)


def test_conflicts_name_layer_and_expert() -> None:
    toward, away = plan({1: {5: 1.0}}), plan({1: {5: -0.25}})
    with pytest.raises(PlanError, match=r"layer 1, expert 5: one edit activates it and another deactivates"):
        _ = toward + away
    summed = compose(toward, away, on_conflict="sum")
    assert summed.strengths == {1: {5: 0.75}}
    assert effective_strengths(summed.edits, "prompt") == {1: {5: 0.75}}
    assert (0.5 * summed).strengths == {1: {5: 0.375}}  # stays a sum
    assert (summed + plan({1: {5: -0.5}})).strengths == {1: {5: 0.25}}
    assert compose(toward, plan({1: {5: 0.0}})).strengths == {1: {5: 1.0}}  # 0 pulls nowhere


def test_opposite_directions_in_scopes_that_never_meet_are_no_conflict() -> None:
    apart = plan({1: {5: 1.0}}, "prompt") + plan({1: {5: -1.0}}, "generated")
    assert effective_strengths(apart.edits, "last") == {1: {5: 1.0}}
    assert effective_strengths(apart.edits, "generated") == {1: {5: -1.0}}
    for first, second in (("prompt", "answer"), ("all", "generated"), ("answer", "generated")):
        with pytest.raises(PlanError, match="layer 1, expert 5"):
            _ = plan({1: {5: 1.0}}, first) + plan({1: {5: -1.0}}, second)


def test_limits_hold_where_scopes_overlap() -> None:
    two, more = {1: {0: 1.0, 1: 1.0}}, {1: {2: 1.0}}
    for first, second in (("prompt", "answer"), ("all", "prompt"), ("generated", "answer")):
        with pytest.raises(PlanError, match="layer 1: 3 experts activated"):
            _ = plan(two, first) + plan(more, second)
    assert len((plan(two, "prompt") + plan(more, "generated")).edits) == 2
    halves = [
        plan({1: dict.fromkeys(range(low, low + 4), -1.0)}, s) for low, s in ((0, "all"), (3, "answer"))
    ]
    with pytest.raises(PlanError, match="layer 1: 1 of 8 experts left alive"):
        _ = halves[0] + halves[1]


def test_limits_are_those_of_the_effective_strengths() -> None:
    """Two edits that cancel an activation leave room for another."""
    cancelled = compose(plan({1: {0: 1.0, 1: 1.0}}), plan({1: {1: -1.0}}), on_conflict="sum")
    assert compose(cancelled, plan({1: {2: 1.0}})).strengths == {1: {0: 1.0, 1: 0.0, 2: 1.0}}


LEVELS = st.sampled_from([-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0])
EDITS = st.builds(
    ExpertEdit,
    st.dictionaries(st.just(1), st.dictionaries(st.integers(0, 3), LEVELS, max_size=3)),
    st.sampled_from(sorted(SCOPES)),
)


@given(st.lists(EDITS, max_size=4), st.sampled_from(["prompt", "last", "generated"]))
def test_effective_strength_is_the_clipped_sum_over_edits_that_hold_the_token(
    edits: list[ExpertEdit], role: str
) -> None:
    holds = {
        "prompt": ("all", "prompt"),
        "last": ("all", "prompt", "answer"),
        "generated": ("all", "answer", "generated"),
    }[role]
    effective = effective_strengths(edits, role).get(1, {})
    for expert in range(4):
        total = sum(e.strengths.get(1, {}).get(expert, 0.0) for e in edits if e.scope in holds)
        assert effective.get(expert, 0.0) == pytest.approx(max(-1.0, min(1.0, total)))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        ({1: {8: 1.0}}, "layer 1 has no expert 8: its experts are 0 to 7"),
        ({1: {-1: 1.0}}, "layer 1 has no expert -1"),
        ({4: {0: 1.0}}, "layer 4 does not exist: the model has layers 0 to 3"),
        ({-1: {0: 1.0}}, "layer -1 does not exist"),
        ({0: {0: 1.0}}, r"layer 0 has no router \(layers with one: 1, 2, 3\)"),
        ({3: {0: 1.0}}, "layer 3 cannot be steered: the routing rule of Novel is not known"),
        ({1: {0: 1.5}}, "expert 0 of layer 1 has strength 1.5"),
        ({1: {0: math.nan}}, "expert 0 of layer 1: strength nan"),
        ({1: {0: -math.inf}}, "strength -inf"),
        ({1: {0.5: 1.0}}, "expert 0.5 is not a whole number"),
        ({"1": {0: 1.0}}, "layer '1' is not a whole number"),
        ({1: {0: 1.0, 1: 1.0, 2: 0.01}}, "layer 1: 3 experts activated, but the router chooses 2"),
        ({2: {0: -1.0, 1: -1.0, 2: -1.0}}, "layer 2: 1 expert left alive in 2 groups"),
    ],
)
def test_plans_that_cannot_be(strengths: dict[int, dict[int, float]], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(strengths)


def test_unknown_scopes_and_operations() -> None:
    with pytest.raises(PlanError, match="scope 'answers' is unknown: use one of all, prompt"):
        ExpertEdit({1: {0: 1.0}}, "answers")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="operation 'add' is unknown at routers"):
        ExpertEdit({1: {0: 1.0}}, operation="add")
    with pytest.raises(PlanError, match="when='gated'"):
        ExpertEdit({1: {0: 1.0}}, when="gated")


def test_from_experts() -> None:
    model = families.shared("deepseek_v3")
    made = Steering.from_experts(
        model, {1: [5], 2: {3: 0.5}}, {1: (0, 1), 2: {6: 1.0}}, scope="answer", strength=0.5
    )
    assert made.strengths == {1: {0: -0.5, 1: -0.5, 5: 0.5}, 2: {3: 0.25, 6: -0.5}}
    assert made.edits[0].scope == "answer"
    assert made.provenance["made"] == "by hand"
    with pytest.raises(PlanError, match="expert 5 of layer 1 is both activated and deactivated"):
        Steering.from_experts(model, {1: [5]}, {1: [5]})
    for strength in (-0.1, 1.1, math.nan, "0.5", True):
        with pytest.raises(PlanError, match=r"strength .*(lie between 0 and 1|is not a finite|is a number)"):
            Steering.from_experts(model, {1: [5]}, strength=strength)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="layer 1: give a list of experts"):
        Steering.from_experts(model, {1: 5})  # type: ignore[dict-item]
    for size in (-0.5, 1.5, math.nan, "0.5"):
        with pytest.raises(PlanError, match=r"expert 5 of layer 1(:| is given the) .*size"):
            Steering.from_experts(model, {1: {5: size}})  # type: ignore[dict-item]
    assert Steering.from_experts(model).edits == ()


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (None, "vectors are a NoneType: right is {layer: direction}"),
        ([[1.0, 2.0]], "vectors are a list: right is {layer: direction}"),
        ({1: [1 + 2j, 0]}, "layer 1: its vector cannot be read (its numbers are complex)"),
    ],
)
def test_what_is_no_vector(vectors: Any, words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        ResidualEdit(vectors)


def test_whole_numbers_beyond_every_float() -> None:
    with pytest.raises(PlanError, match="strength inf is not a finite number"):
        ResidualEdit({1: [1.0]}, strength=10**400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = plan({1: {0: 0.5}})
        scaled = [half * number for number in (2, np.float16(2), np.float32(2), np.longdouble(2))]
        assert scaled == [2.0 * half] * 4
        for beyond in (np.float32("inf"), np.longdouble("1e400"), math.nan):
            with pytest.raises(PlanError, match=r"factor .* is not a finite number"):
                half * beyond
    with pytest.raises(PlanError, match="factor inf is not a finite number"):
        plan({1: {0: 1.0}}) * 10**400
