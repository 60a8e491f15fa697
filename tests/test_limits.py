"""Limits: what a router lets a plan do, against every choice that routing could make."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.limits import Router, broken_limit


def router(experts: int = 8, top_k: int = 2, groups: tuple[int, int] | None = None) -> Router:
    return Router(layer=0, experts=experts, top_k=top_k, rule="softmax-topk", groups=groups)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Router, dict[int, float]]:
    groups = draw(st.sampled_from([None, (4, 2), (2, 1), (4, 3), (4, 1)]))
    levels = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])
    strengths = draw(st.dictionaries(st.integers(0, 7), levels, max_size=8))
    return router(8, draw(st.integers(1, 3)), groups), strengths


def can_be_kept(site: Router, strengths: dict[int, float]) -> bool:
    """Whether whatever the scores are, the experts left to routing hold the promise: tried one by one.

    A soft strength counts by its sign, as at its bound it acts like a full one; but only a full activation is
    sure to have its group kept.
    """
    activated = {expert for expert, strength in strengths.items() if strength > 0}
    full = {expert for expert, strength in strengths.items() if strength >= 1}
    dead = {expert for expert, strength in strengths.items() if strength < 0}
    if len(activated) > site.top_k:
        return False
    n_group, kept = site.groups or (1, 1)
    size = site.experts // n_group
    if len({expert // size for expert in activated}) > kept:
        return False
    forced = {expert // size for expert in full}
    for chosen in itertools.combinations(range(n_group), kept):
        if forced <= set(chosen):
            live = [e for e in range(site.experts) if e // size in chosen and e not in dead]
            if len(live) < site.top_k:
                return False
    return True


@given(plans())
def test_a_limit_is_broken_exactly_where_routing_could_break_the_promise(
    plan: tuple[Router, dict[int, float]],
) -> None:
    site, strengths = plan
    assert (broken_limit(site, strengths) is None) == can_be_kept(site, strengths)


@pytest.mark.parametrize(
    ("site", "strengths", "words"),
    [
        (router(), {0: 1, 1: 1}, None),
        (router(), {0: 1, 1: 1, 2: 0.1}, "3 experts activated, but the router chooses 2"),
        (router(), dict.fromkeys(range(6), -1), None),
        (router(), dict.fromkeys(range(7), -1), "1 of 8 experts left alive, but the router chooses 2"),
        (router(), {0: 0.0, 1: 1, 2: 1}, None),
        (router(groups=(4, 2)), {0: -1, 2: -1, 4: -1, 6: -1}, None),
        (
            router(top_k=3, groups=(4, 2)),
            {0: -1, 2: -1, 4: -1, 6: -1},
            "2 experts left alive in 2 groups that the router could keep, but it chooses 3",
        ),
        (router(top_k=3, groups=(4, 2)), {0: 1, 2: 1, 4: 1}, "3 groups, but the router keeps 2"),
        (router(top_k=3, groups=(4, 2)), {0: 1, 1: 1, 2: 1}, None),
        # Both kept groups are full activations': the other two may be dead.
        (router(groups=(4, 2)), {0: 1, 2: 1, 4: -1, 5: -1, 6: -1, 7: -1}, None),
        # A soft activation does not make sure of its group.
        (router(groups=(4, 2)), {0: 0.9, 2: 1, 4: -1, 5: -1, 6: -1, 7: -1, 3: -1}, "1 expert left alive"),
    ],
)
def test_limits_in_words(site: Router, strengths: dict[int, float], words: str | None) -> None:
    broken = broken_limit(site, strengths)
    if words is None:
        assert broken is None
    else:
        assert broken is not None
        assert words in broken


def test_groups_of_experts() -> None:
    site = router(12, 2, (3, 1))
    assert [site.group_of(expert) for expert in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert router().group_of(7) == 0
    assert site.steerable
    assert not Router(0, 8, 2, "unknown", reason="why not").steerable
