"""The bank and its steps against a slow, obvious version: token by token, each under its own plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.concepts.residual import Add, Project, edit_states
from steersman.errors import ServingError, SteeringNotApplied
from steersman.experts.bounds import edit_scores
from steersman.vllm.bank import Bank, Places, Room, RouterPlace
from steersman.vllm.live import LiveRequests, Span
from steersman.vllm.plan_rows import PlanRow
from steersman.vllm.routing import Rule, choose, tell_dead_apart
from steersman.vllm.step import Step

EXPERTS, WIDTH = 6, 5
PLACES = Places((RouterPlace(1, EXPERTS), RouterPlace(4, EXPERTS)), (0, 2), WIDTH)


def bank(slots: int = 2, vectors: int = 40) -> Bank:
    room = Room(plans=4, vectors=vectors, slots=slots, components=3, tokens=64)
    return Bank(PLACES, room, torch.device("cpu"))


def drawn_rows(seed: int, slots: int) -> tuple[PlanRow, ...]:
    """Rows of a plan at random: full and soft strengths, vectors added and taken out, roles without edits."""
    generator = torch.Generator().manual_seed(seed)

    def number() -> float:
        return float(torch.rand((), generator=generator))

    def row() -> PlanRow:
        if number() < 0.2:
            return PlanRow({}, {})
        strengths = {
            layer: {
                expert: float((number() < 0.5) - 0.5) * 2 * (1.0 if number() < 0.5 else 0.4)
                for expert in (0, 3)
            }
            for layer in (1, 4)
            if number() < 0.7
        }
        steps = {}
        for layer in (0, 2):
            if number() < 0.7:
                steps[layer] = [Add(torch.randn(WIDTH, generator=generator))]
                if slots > 1:
                    direction = torch.randn(WIDTH, generator=generator)
                    steps[layer].append(Project(direction / direction.norm(), torch.tensor(0.6)))
        return PlanRow(strengths, steps)

    return row(), row(), row()


def drawn_spans(seed: int, held: Bank, tokens: int) -> list[Span]:
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    spans, at = [], 0
    while at < tokens:
        length = whole(1, 4)
        rows = [
            held.row(slot, whole(0, 3))
            for slot in torch.randperm(3, generator=generator)[: whole(0, 3)].tolist()
        ]
        follows = tuple((row, (1.0, 0.5, 0.25)[whole(0, 3)]) for row in rows if row)
        if follows:
            spans.append(Span(at, min(at + length, tokens), follows))
        at += length
    return spans


def follows_of(spans: list[Span], token: int) -> tuple[tuple[int, float], ...]:
    return next((span.follows for span in spans if span.first <= token < span.end), ())


def slow_strengths(plans: dict[int, PlanRow], follows: tuple[tuple[int, float], ...], layer: int) -> Tensor:
    total = torch.zeros(EXPERTS)
    for row, by in follows:
        for expert, strength in plans[row].strengths.get(layer, {}).items():
            total[expert] += strength * by
    return total.clamp(-1, 1)


def filled(seed: int, slots: int) -> tuple[Bank, dict[int, PlanRow]]:
    made, plans = bank(slots), {}
    for slot in range(3):
        rows = drawn_rows(seed + slot, slots)
        made.write(slot, rows)
        plans |= {made.row(slot, role): row for role, row in enumerate(rows) if made.row(slot, role)}
    return made, plans


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_scores(seed: int, tokens: int, dtype: torch.dtype) -> None:
    held, plans = filled(seed, 1)
    spans = drawn_spans(seed, held, tokens)
    if not spans:
        return
    step = Step(held, spans, tokens)
    scores = torch.randn(tokens + 2, EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for index, place in enumerate(PLACES.routers):
        edited = scores.clone()
        if index in step.busy:
            step.edit_scores(index, edited)
        for token in range(tokens):
            strengths = slow_strengths(plans, follows_of(spans, token), place.layer)
            assert torch.equal(edited[token], edit_scores(scores[token : token + 1], strengths)[0])
        assert torch.equal(edited[tokens:], scores[tokens:])  # padding


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([1, 2]), st.booleans())
def test_states(seed: int, tokens: int, slots: int, two: bool) -> None:
    held, plans = filled(seed, slots)
    spans = drawn_spans(seed, held, tokens)
    if not spans:
        return
    step = Step(held, spans, tokens)
    generator = torch.Generator().manual_seed(seed)
    hidden, residual = torch.randn(2, tokens + 1, WIDTH, generator=generator)
    hidden[0] = -0.0
    for block, layer in enumerate(PLACES.blocks):
        edited = hidden.clone()
        if len(PLACES.routers) + block in step.busy:
            step.edit_states(block, edited, residual if two else None)
        for token in range(tokens):
            state = hidden[token] + residual[token] if two else hidden[token]
            steps = []
            for row, by in follows_of(spans, token):
                for one in plans[row].steps.get(layer, ()):
                    scaled = (
                        Add(one.vector * by)
                        if isinstance(one, Add)
                        else Project(one.direction, one.share * by)
                    )
                    steps.append(scaled)
            expected = edit_states(state[None], steps)[0] - (residual[token] if two else 0.0)
            torch.testing.assert_close(edited[token], expected, atol=1e-5, rtol=1e-5)
            if not steps:  # to the bit, the sign of zero included
                assert torch.equal(edited[token].view(torch.int32), hidden[token].view(torch.int32))


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    held = bank(slots=1, vectors=3)
    held.write(0, (PlanRow({}, {0: [Add(torch.ones(WIDTH))]}),) * 3)
    before = held.vectors.clone(), held.vector_ids.clone(), held.free_vectors
    many = PlanRow({}, {layer: [Add(torch.ones(WIDTH))] for layer in (0, 2)})
    with pytest.raises(ServingError, match="room for 2 more"):
        held.write(1, (many, PlanRow({}, {0: [Add(torch.ones(WIDTH))]}), PlanRow({}, {})))
    project = PlanRow({}, {0: [Project(torch.ones(WIDTH), torch.tensor(1.0))]})
    with pytest.raises(ServingError, match="takes 2 steps at one layer's output, and there is room for 1"):
        held.write(1, (project,) * 3)
    assert torch.equal(held.vectors, before[0])
    assert torch.equal(held.vector_ids, before[1])
    assert held.free_vectors == before[2]


def test_rows_that_add_only_are_told_from_others() -> None:
    held = bank(slots=2)
    direction = torch.ones(WIDTH) / WIDTH**0.5
    held.write(0, (PlanRow({}, {0: [Add(torch.ones(WIDTH))]}),) * 3)
    held.write(
        1, (PlanRow({}, {0: [Project(direction, torch.tensor(1.0))]}), PlanRow({}, {}), PlanRow({}, {}))
    )
    assert held.stepping == {held.row(1, 0)}
    held.write(1, (PlanRow({}, {2: [Add(torch.ones(WIDTH))]}),) * 3)
    assert held.stepping == set()


def test_slots_are_used_again() -> None:
    held = bank(vectors=4)
    rows = (PlanRow({1: {2: 1.0}}, {0: [Add(torch.ones(WIDTH))], 2: [Add(torch.ones(WIDTH))]}),) * 3
    for turn in range(50):
        held.write(turn % 2, rows)
    held.clear(0)
    held.clear(1)
    assert held.free_vectors == 4
    assert not held.strengths.any()
    assert not held.vector_ids.any()


def test_a_request_whose_place_holds_another_plan_is_an_error() -> None:
    held = bank()
    live = LiveRequests(held)
    told = {"steersman": {"slots": [[2, 1.0]], "plans": ["meant"]}}
    with pytest.raises(
        SteeringNotApplied, match="follows plan meant in place 2, where this worker holds none"
    ):
        live.add("one", told, [1, 2, 3])
    rows = (PlanRow({1: {2: 1.0}}, {}),) * 3
    held.write(2, rows, "another")
    with pytest.raises(SteeringNotApplied, match="where this worker holds another"):
        live.add("one", told, [1, 2, 3])
    held.write(2, rows, "meant")
    live.add("one", told, [1, 2, 3])
    assert len(live) == 1


def slow_choice(z: Tensor, strengths: Tensor, rule: Rule) -> tuple[list[int], list[float]]:
    """One token's choice in plain Python: the rule, word by word."""
    f = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}.get(
        rule.scoring, lambda x: torch.nn.functional.softplus(x).sqrt()
    )
    c = f(z) + (rule.bias if rule.bias is not None else 0)
    c = edit_scores(c[None], strengths[None])[0].tolist()
    weigh = f(edit_scores(z[None], strengths[None])[0]).tolist()
    rank = [float("inf") if s == 1 else float("-inf") if s == -1 else 0.0 for s in strengths.tolist()]
    candidates = list(range(len(c)))
    if rule.groups is not None:
        size = len(c) // rule.groups[0]
        of = [list(range(g * size, (g + 1) * size)) for g in range(rule.groups[0])]
        best = 1 if rule.group_score == "max" else 2
        score = [
            float("inf")
            if any(rank[e] > 0 for e in g)
            else sum(sorted((c[e] for e in g), reverse=True)[:best])
            for g in of
        ]
        kept = sorted(range(len(of)), key=lambda g: -score[g])[: rule.groups[1]]
        candidates = [e for g in kept for e in of[g]]
    chosen = sorted(candidates, key=lambda e: -(c[e] + rank[e]))[: rule.top_k]
    weights = [weigh[e] for e in chosen]
    total = sum(weights) if rule.renormalised else 1.0
    return chosen, [w / total * rule.scaling for w in weights]


@settings(max_examples=100)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    st.booleans(),
    st.sampled_from([None, (4, 2), (2, 1)]),
    st.sampled_from(["max", "top2"]),
    st.booleans(),
)
def test_rules(
    seed: int, scoring: str, renormalised: bool, groups: tuple[int, int] | None, best: str, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(5, 8, generator=generator) * 2
    strengths = torch.zeros(5, 8)
    strengths[:, 1], strengths[:, 6], strengths[2:, 4] = 1.0, -1.0, 0.5
    bias = torch.randn(8, generator=generator) * 0.3 if biased else None
    rule = Rule(2, scoring, renormalised, groups, best, bias, 1.5)  # type: ignore[arg-type]
    weights, ids = choose(z, strengths, rule)
    for token in range(5):
        chosen, expected = slow_choice(z[token], strengths[token], rule)
        assert sorted(ids[token].tolist()) == sorted(chosen)
        assert dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True)) == pytest.approx(
            dict(zip(chosen, expected, strict=True)), rel=1e-5
        )


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 30.0, 500.0]))
def test_a_dead_expert_is_not_rounded_back_to_life(seed: int, size: float) -> None:
    scores = torch.randn(7, 8, generator=torch.Generator().manual_seed(seed)) * size
    strengths = torch.zeros(7, 8)
    strengths[:, 2] = -1.0
    strengths[3:, 5] = 1.0
    edited = tell_dead_apart(edit_scores(scores, strengths), strengths)
    shares = edited.softmax(dim=-1)
    others = shares[:, [e for e in range(8) if e != 2]]
    assert bool((others > shares[:, 2:3]).all())
    plain = edit_scores(scores, strengths).softmax(dim=-1)
    torch.testing.assert_close(shares, plain, atol=1e-30, rtol=1e-5)
