"""Choosing experts against a slow, obvious version; its limits by brute force over what routing can pick."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import contrasts
from steersman import ExpertEdit, PlanError, RoutingContrast, Steering
from steersman.experts.risk_difference import ClusterSums
from steersman.experts.selection import Choice, choose, ranked
from steersman.limits import Router, broken_limit

PLAIN = Router(3, 6, 2, "softmax-topk")
GROUPED = Router(5, 8, 2, "sigmoid-topk", groups=(4, 2))
ROUTERS = {3: PLAIN, 5: GROUPED}

# Limits -----------------------------------------------------------------------------------------------------


def keeps_promise(router: Router, strengths: Mapping[int, float]) -> bool:
    """Whether the experts with λ > 0 can all be chosen and those with λ < 0 all be left, whatever groups are
    kept: tried for every choice of groups that routing could make.
    """
    experts = range(router.experts)
    up = {e for e in experts if strengths.get(e, 0) > 0}
    live = {e for e in experts if strengths.get(e, 0) >= 0}
    n_group, topk_group = router.groups or (1, 1)
    size = router.experts // n_group
    sure = {e // size for e, strength in strengths.items() if strength == 1}
    choices = [set(kept) for kept in itertools.combinations(range(n_group), topk_group)]
    possible = [kept for kept in choices if sure <= kept]
    return (
        len(up) <= router.top_k
        and any({e // size for e in up} <= kept for kept in choices)
        and all(len([e for e in live if e // size in kept]) >= router.top_k for kept in possible)
    )


@st.composite
def limited(draw: st.DrawFn) -> tuple[Router, dict[int, float]]:
    n_group, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    topk_group = draw(st.integers(1, n_group))
    groups = (n_group, topk_group) if draw(st.booleans()) else None
    candidates = size * topk_group if groups else n_group * size
    router = Router(0, n_group * size, draw(st.integers(1, candidates)), "rule", groups=groups)
    levels = st.sampled_from([-1.0, -1.0, -0.5, 0.0, 0.5, 1.0])
    experts = draw(st.sets(st.integers(0, router.experts - 1)))
    return router, {expert: draw(levels) for expert in sorted(experts)}


@given(limited())
def test_limits_are_those_that_every_choice_of_groups_gives(
    problem: tuple[Router, dict[int, float]],
) -> None:
    router, strengths = problem
    reason = broken_limit(router, strengths)
    assert (reason is None) == keeps_promise(router, strengths)
    assert reason is None or "\n" not in reason


def test_reasons_say_which_limit() -> None:
    assert "3 experts activated" in str(broken_limit(PLAIN, {0: 1, 1: 1, 2: 1}))
    assert "1 of 6 experts left alive" in str(broken_limit(PLAIN, dict.fromkeys(range(5), -1)))
    wide = Router(5, 8, 4, "rule", groups=(4, 2))
    assert "activated experts in 3 groups" in str(broken_limit(wide, {0: 1, 2: 1, 4: 1}))
    assert "1 expert left alive in 2 groups" in str(broken_limit(GROUPED, {0: -1, 1: -1, 2: -1}))
    assert broken_limit(GROUPED, {0: -1, 1: -1, 2: -1, 4: 1}) is None  # group 2 is sure to be kept


# Choosing ---------------------------------------------------------------------------------------------------

Entry = tuple[int, int, float]


def obvious_choice(
    scores: dict[tuple[int, int], float], activate: int, deactivate: int, top: int | None, strength: float
) -> tuple[list[Entry], list[Entry]] | None:
    """Taken and skipped entries in rank order, by picking the best again and again; None where too few."""
    left = {place: score for place, score in scores.items() if score != 0 and not math.isnan(score)}
    ranking: list[Entry] = []
    while left:
        best = max(abs(score) for score in left.values())
        place = min(place for place, score in left.items() if abs(score) == best)
        ranking.append((*place, left.pop(place)))
    wanted: list[Entry] = []
    remaining = {1.0: activate, -1.0: deactivate}
    for entry in ranking:
        sign = math.copysign(1.0, entry[2])
        if top is not None and len(wanted) < top:
            wanted.append(entry)
        elif top is None and remaining[sign]:
            remaining[sign] -= 1
            wanted.append(entry)
    if len(wanted) != (top if top is not None else activate + deactivate):
        return None
    strengths: dict[int, dict[int, float]] = {}
    taken, skipped = [], []
    for layer, expert, score in wanted:
        tried = {**strengths.get(layer, {}), expert: math.copysign(strength, score)}
        if keeps_promise(ROUTERS[layer], tried):
            strengths[layer] = tried
            taken.append((layer, expert, score))
        else:
            skipped.append((layer, expert, score))
    return taken, skipped


score_tables = st.fixed_dictionaries(
    {
        (layer, expert): st.sampled_from([-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, math.nan])  # many ties
        for layer, router in ROUTERS.items()
        for expert in range(router.experts)
    }
)


def table_of(scores: dict[tuple[int, int], float]) -> np.ndarray:
    """[layers, experts], NaN where a layer has fewer."""
    table = np.full((2, 8), np.nan)
    for (layer, expert), score in scores.items():
        table[(3, 5).index(layer), expert] = score
    return table


@given(
    score_tables,
    st.tuples(st.integers(0, 6), st.integers(0, 8)) | st.integers(0, 15),
    st.sampled_from([1.0, 0.5]),
)
def test_choice_is_the_obvious_one(
    scores: dict[tuple[int, int], float], asked: tuple[int, int] | int, strength: float
) -> None:
    activate, deactivate, top = (0, 0, asked) if isinstance(asked, int) else (*asked, None)
    numbers = {"top": top} if top is not None else {"activate": activate, "deactivate": deactivate}
    ranking = ranked(table_of(scores), [3, 5])
    expected = obvious_choice(scores, activate, deactivate, top, strength)
    if expected is None:
        with pytest.raises(PlanError, match=r"were asked for, but there are \d+$"):
            choose(ranking, ROUTERS, **numbers, strength=strength)
        return
    choice = choose(ranking, ROUTERS, **numbers, strength=strength)
    taken, skipped = expected
    signs: dict[int, dict[int, float]] = {}
    for layer, expert, score in taken:
        signs.setdefault(layer, {})[expert] = math.copysign(1.0, score)
    assert choice.signs == signs
    assert [(entry["layer"], entry["expert"]) for entry in choice.skipped] == [e[:2] for e in skipped]
    assert all(isinstance(entry["reason"], str) and entry["reason"] for entry in choice.skipped)
    for sign in (1, -1):
        assert choice.count(sign) == sum(entry[2] * sign > 0 for entry in taken)


def test_ties_go_by_layer_then_expert() -> None:
    table = np.array([[-0.5, 0.5, 0.1], [0.5, -0.5, 0.7]])
    assert ranked(table, [4, 9]) == [
        (9, 2, 0.7),
        (4, 0, -0.5),
        (4, 1, 0.5),
        (9, 0, 0.5),
        (9, 1, -0.5),
        (4, 2, 0.1),
    ]


def test_no_difference_and_no_number_are_never_ranked() -> None:
    assert ranked(np.array([[0.0, -0.0, math.nan, 0.2]]), [0]) == [(0, 3, 0.2)]


def test_skipped_is_not_replaced() -> None:
    ranking = [(3, expert, 0.9 - expert / 10) for expert in range(4)] + [(5, 0, 0.1)]
    choice = choose(ranking, ROUTERS, activate=4)
    assert choice.signs == {3: {0: 1, 1: 1}}
    assert choice.skipped == (
        {"layer": 3, "expert": 2, "reason": "3 experts activated, but the router chooses 2"},
        {"layer": 3, "expert": 3, "reason": "3 experts activated, but the router chooses 2"},
    )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "say how many experts"),
        ({"top": 2, "activate": 1}, "say how many experts"),
        ({"top": 2, "deactivate": 0}, "say how many experts"),
        ({"top": -1}, "top is -1"),
        ({"activate": -1}, "activate is -1"),
        ({"activate": 1, "deactivate": -3}, "deactivate is -3"),
        ({"top": 4}, "4 experts with a difference in use were asked for, but there are 3"),
        ({"activate": 3}, "3 experts to activate were asked for, but there are 2"),
        ({"deactivate": 2}, "2 experts to deactivate were asked for, but there are 1"),
    ],
)
def test_bad_numbers_are_one_clear_line(numbers: dict[str, int], message: str) -> None:
    ranking = [(3, 0, 0.5), (3, 1, -0.4), (5, 0, 0.3)]
    with pytest.raises(PlanError, match=message) as raised:
        choose(ranking, ROUTERS, **numbers)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "numbers", [{"top": 0}, {"activate": 0}, {"deactivate": 0}, {"activate": 0, "deactivate": 0}]
)
def test_none_asked_for_is_none_chosen(numbers: dict[str, int]) -> None:
    assert choose([(3, 0, 0.5)], ROUTERS, **numbers) == Choice({}, ())


# Selecting from counts --------------------------------------------------------------------------------------


def contrast_of(delta: dict[int, dict[int, tuple[int, int]]], clusters: int = 25) -> RoutingContrast:
    """Layers 1 (8 experts, top 2), 2 (groups), 4 (6 experts, top 3); {layer: {expert: uses of 10 tokens on
    either side}} in each of the clusters, with a little noise between clusters.
    """
    base = contrasts.made(1)
    rows = {layer: row for row, layer in enumerate(base.layers)}
    sums = ClusterSums.zeros(3, 8)
    total = np.zeros((2, 3, 8), np.int64)
    for cluster in range(clusters):
        a = np.zeros((2, 3, 8), np.int64)
        for layer, experts in delta.items():
            for expert, uses in experts.items():
                a[:, rows[layer], expert] = [100 * use + (cluster % 3 - 1) * 10 for use in uses]
        a = np.maximum(a, 0)
        sums.add(a[0], 1000, a[1], 1000)
        total += a
    total[:, 2, 6:] = -1
    return RoutingContrast(
        activations=total,
        tokens=np.array([1000 * clusters] * 2),
        sums=sums,
        architecture=base.architecture,
        weights_id="w",
        cluster_ids=np.arange(clusters),
        pairs=clusters,
    )


def test_select_takes_the_largest_differences() -> None:
    contrast = contrast_of({1: {0: (9, 1), 1: (1, 8)}, 2: {3: (5, 4)}, 4: {5: (2, 8), 0: (4, 3)}})
    plan = contrast.select(activate=2, deactivate=1, scope="answer", strength=0.5)
    assert plan.edits == (ExpertEdit({1: {0: 0.5, 1: -0.5}, 2: {3: 0.5}}, "answer"),)
    assert contrast.select(top=3).strengths == {1: {0: 1, 1: -1}, 4: {5: -1}}
    assert plan.architecture_id == contrast.architecture.id
    assert plan.weights_id == "w"


def test_select_reports_what_it_was_asked_and_what_it_skipped() -> None:
    contrast = contrast_of({1: {0: (9, 1), 1: (8, 1), 2: (7, 1)}, 4: {0: (1, 2)}})
    plan = contrast.select(activate=3, deactivate=0)
    assert plan.strengths == {1: {0: 1, 1: 1}}
    assert plan.provenance["made"] == "selection"
    assert plan.provenance["skipped"] == [
        {"layer": 1, "expert": 2, "reason": "3 experts activated, but the router chooses 2"}
    ]
    assert (plan.provenance["activate"], plan.provenance["deactivate"]) == (3, 0)
    assert plan.provenance["from"][0]["sha256"] == contrast.sha256


def test_reverse_swaps_the_sides_before_choosing() -> None:
    contrast = contrast_of({1: {0: (9, 1), 1: (1, 8), 2: (1, 7)}, 4: {5: (2, 8)}})
    swapped = contrast_of({1: {0: (1, 9), 1: (8, 1), 2: (7, 1)}, 4: {5: (8, 2)}})
    for numbers in ({"activate": 1, "deactivate": 1}, {"activate": 3}, {"top": 3}):
        assert contrast.select(**numbers, reverse=True).edits == swapped.select(**numbers).edits
    # The limits are those of the swapped plan: three may be put out, but only two of them in.
    assert len(contrast.select(deactivate=3).strengths[1]) == 2
    assert contrast.select(deactivate=3).strengths[4] == {5: -1}
    assert contrast.select(activate=3, reverse=True).strengths == {1: {1: 1, 2: 1}, 4: {5: 1}}


def test_an_expert_without_difference_is_never_chosen() -> None:
    contrast = contrast_of({1: {0: (9, 1), 3: (5, 5)}, 4: {1: (2, 3)}})
    assert contrast.select(top=2).strengths == {1: {0: 1}, 4: {1: -1}}
    with pytest.raises(PlanError, match="3 experts with a difference in use were asked for, but there are 2"):
        contrast.select(top=3)


def test_lower_bound_prefers_what_is_certain() -> None:
    """Expert 0 differs more but in few clusters; expert 1 less, in all of them alike."""
    base = contrast_of({1: {0: (0, 0), 1: (0, 0)}})
    sums = ClusterSums.zeros(3, 8)
    total = np.zeros((2, 3, 8), np.int64)
    for cluster in range(25):
        a = np.zeros((2, 3, 8), np.int64)
        a[0, 0, 0] = 1000 if cluster < 10 else 0  # Δ = .40
        a[0, 0, 1] = 350 + cluster % 2  # Δ = .35
        a[1, 0, 2] = 300 + cluster % 2  # Δ = -.30
        sums.add(a[0], 1000, a[1], 1000)
        total += a
    total[:, 2, 6:] = -1
    contrast = RoutingContrast(total, np.array([25000] * 2), sums, base.architecture, "w", np.arange(25), 25)
    low, high = contrast.interval()
    first, second, third = ((1, expert, contrast.risk_difference[0, expert]) for expert in (0, 1, 2))
    assert contrast.ranking() == [first, second, third]
    assert low[0, 1] > -high[0, 2] > low[0, 0]
    bounds = contrast.ranking("lower_bound")
    assert bounds == [second, third, first]
    assert contrast.ranking("lower_bound", reverse=True) == [(*place, -score) for *place, score in bounds]
    assert contrast.select(activate=1, by="lower_bound").strengths == {1: {1: 1}}
    assert contrast.select(activate=1).strengths == {1: {0: 1}}


def test_lower_bound_needs_errors() -> None:
    with pytest.raises(PlanError, match="needs at least 20 clusters, there are 19"):
        contrasts.made(19).select(top=1, by="lower_bound")
    assert contrasts.made(20).select(top=1, by="lower_bound").edits


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, math.inf, "0.5", True])
def test_strength_lies_between_0_and_1(strength: float) -> None:
    with pytest.raises(PlanError, match=r"strength .*(lie between 0 and 1|not a finite number|is a number)"):
        contrasts.made().select(top=1, strength=strength)


def test_unknown_ways_to_rank_and_scopes() -> None:
    with pytest.raises(PlanError, match="by='causal' is unknown"):
        contrasts.made().select(top=1, by="causal")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="scope 'every' is unknown"):
        contrasts.made().select(top=1, scope="every")  # type: ignore[arg-type]


@given(
    st.integers(0, 200),
    st.tuples(st.integers(0, 8), st.integers(0, 8)) | st.integers(0, 18),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_what_is_selected_is_always_a_plan_within_limits(
    seed: int, asked: tuple[int, int] | int, reverse: bool, strength: float
) -> None:
    """Whatever the counts: select skips what a limit forbids, so that the plan itself never breaks one."""
    contrast = contrasts.made(3, seed=seed)
    numbers = {"top": asked} if isinstance(asked, int) else {"activate": asked[0], "deactivate": asked[1]}
    signs = [score > 0 for *_, score in contrast.ranking(reverse=reverse)]
    if isinstance(asked, int):
        enough = len(signs) >= asked
    else:
        enough = sum(signs) >= asked[0] and len(signs) - sum(signs) >= asked[1]
    if not enough:
        with pytest.raises(PlanError, match="were asked for, but there are"):
            contrast.select(**numbers, reverse=reverse, strength=strength)
        return
    plan = contrast.select(**numbers, reverse=reverse, strength=strength)
    assert isinstance(plan, Steering)
    named = sum(len(experts) for experts in plan.strengths.values())
    assert named + len(plan.provenance["skipped"]) == sum(numbers.values())
    for layer, experts in plan.strengths.items():
        assert keeps_promise(contrast.architecture.router(layer), experts)


def test_a_soft_selection_skips_what_only_a_full_one_may_have() -> None:
    """At λ = 1 the group of expert 0 is sure to be kept; at λ = ½ routing may keep two that are dead."""
    contrast = contrast_of({2: {0: (9, 1), 2: (1, 8), 3: (1, 7), 4: (1, 6)}})
    assert contrast.select(top=4).strengths == {2: {0: 1, 2: -1, 3: -1, 4: -1}}
    soft = contrast.select(top=4, strength=0.5)
    assert soft.strengths == {2: {0: 0.5, 2: -0.5, 3: -0.5}}
    assert [(entry["layer"], entry["expert"]) for entry in soft.provenance["skipped"]] == [(2, 4)]
