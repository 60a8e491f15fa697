"""Steered routing in real transformers models of every family: who is chosen, with which weights, at the
limits and with extreme scores; against routing rules written a second time.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import families as f
from steersman import PlanError, Steering, SteeringNotApplied, apply_rows

LAYER = 2
BATCH = f.token_ids(4, 9)


def steered_step(model: nn.Module, plan: Steering, ids: Tensor = BATCH, layer: int = LAYER) -> f.Step:
    with plan.apply(model):
        return f.choices(model, layer, lambda: model(ids))


def assert_promise(step: f.Step, activated: list[int], deactivated: list[int]) -> None:
    for expert in activated:
        assert bool(step.has(expert).all()), (
            f"expert {expert} chosen for {step.has(expert).float().mean():.0%}"
        )
    for expert in deactivated:
        assert not bool(step.has(expert).any()), (
            f"expert {expert} chosen for {step.has(expert).float().mean():.0%}"
        )
    distinct = [len(set(row)) for row in step.chosen.tolist()]
    assert distinct == [step.chosen.shape[1]] * len(distinct)
    assert bool(torch.isfinite(step.weights).all())


# --------------------------------------------------------------------------- the promise

ONE_DEAD_IN_EACH_GROUP = [0, 2, 4, 6]

PLANS: list[tuple[str, list[int], list[int]]] = [
    ("one in", [5], []),
    ("one out", [], [5]),
    ("both", [6], [0, 3]),
    ("k in", [1, 3], []),
    ("k in and the most out", [1, 3], [0, 2, 4, 5, 6, 7]),
    ("one dead in each group", [], ONE_DEAD_IN_EACH_GROUP),
    ("one dead in each group, one in", [1], ONE_DEAD_IN_EACH_GROUP),
    ("two in one group", [4, 5], [0, 1]),
    ("two groups", [0, 7], [1, 2, 5, 6]),
]
UNGROUPED_PLANS: list[tuple[str, list[int], list[int]]] = [
    ("all but k out", [], [0, 1, 2, 4, 5, 7]),
    ("one in, all but k out", [6], [0, 1, 2, 4, 5, 7]),
]


def plans_of(name: str) -> list[tuple[str, list[int], list[int]]]:
    if name not in f.GROUPED:
        return PLANS + UNGROUPED_PLANS
    return [plan for plan in PLANS if plan[0] != "k in and the most out"] + [
        # With both groups kept by an activation, everything else may die.
        ("k in from both groups, all else out", [0, 7], [1, 2, 3, 4, 5, 6])
    ]


@pytest.mark.parametrize("scale", [1.0, 50.0, 200.0])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_promise_with_ordinary_and_extreme_scores(name: str, scale: float) -> None:
    model = f.shared(name, scale=scale)
    for title, activated, deactivated in plans_of(name):
        for layer in f.moe_layers(name)[-2:]:
            plan = Steering.from_experts(model, {layer: activated}, {layer: deactivated})
            step = steered_step(model, plan, layer=layer)
            try:
                assert_promise(step, activated, deactivated)
            except AssertionError as error:
                raise AssertionError(f"{title}, layer {layer}: {error}") from None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_promise_in_half_precision(name: str, scale: float, dtype: torch.dtype) -> None:
    model = f.shared(name, scale=scale, dtype=dtype)
    for _, activated, deactivated in plans_of(name):
        plan = Steering.from_experts(model, {LAYER: activated}, {LAYER: deactivated})
        assert_promise(steered_step(model, plan), activated, deactivated)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_promise_with_every_experts_implementation(name: str, implementation: str) -> None:
    model = f.shared(name, implementation=implementation)
    assert model.config._experts_implementation == implementation
    for _, activated, deactivated in plans_of(name)[2:6:3]:
        plan = Steering.from_experts(model, {LAYER: activated}, {LAYER: deactivated})
        assert_promise(steered_step(model, plan), activated, deactivated)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer"])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_promise_while_generating(name: str, scope: str) -> None:
    """Every layer at once; tokens out of scope choose as they would have."""
    model = f.shared(name)
    layers = f.moe_layers(name)
    activate, deactivate = {layer: [5] for layer in layers}, {layer: [2, 6] for layer in layers}
    plan = Steering.from_experts(model, activate, deactivate, scope=scope)
    ids, mask = f.padded([6, 3, 5], "left")
    with plan.apply(model), f.watching(model, LAYER) as steps:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert [step.shape for step in steps] == [(3, 6), (3, 1), (3, 1), (3, 1)]
    for number, step in enumerate(steps):
        inside = torch.zeros(step.shape, dtype=torch.bool)
        if number:
            inside[:] = scope != "prompt"
        else:
            inside[:] = (mask == 1) & (scope in ("all", "prompt"))
            inside[:, -1] = scope != "generated"
        inside = inside.reshape(-1)
        assert bool(step.has(5)[inside].all())
        assert not bool((step.has(2) | step.has(6))[inside].any())
        before = f.unsteered(f.router_of(model, LAYER), step)
        assert torch.equal(step.chosen[~inside], before[2][~inside])
        assert torch.equal(step.weights[~inside], before[1][~inside])


# --------------------------------------------------------------------------- routing rules, written again


def edited(row: Tensor, strengths: dict[int, float], dtype: torch.dtype) -> Tensor:
    """The editing rule of the design for one token, in double precision."""
    row = row.double()
    high, low, sigma = float(row.max()), float(row.min()), float(row.std(correction=0))
    eps = torch.finfo(dtype).eps
    above, below = high + max(0.01, 4 * eps * abs(high)), low - max(0.01, 4 * eps * abs(low))
    result = row.clone()
    for expert, strength in strengths.items():
        x = float(row[expert])
        if abs(strength) == 1:
            result[expert] = above if strength > 0 else below
        else:
            beta = abs(strength) / (1 - abs(strength))
            result[expert] = min(x + beta * sigma, above) if strength > 0 else max(x - beta * sigma, below)
    return result


def best(scores: Tensor, count: int, strengths: dict[int, float], pool: list[int]) -> list[int]:
    """The `count` best of `pool`: full activations first, full deactivations last, then by score."""
    rank = {expert: (strengths.get(expert, 0) == 1) - (strengths.get(expert, 0) == -1) for expert in pool}
    return sorted(pool, key=lambda expert: (-rank[expert], -float(scores[expert])))[:count]


def kept_groups(group_scores: list[float], strengths: dict[int, float], count: int) -> list[int]:
    """The groups that routing keeps: those of full activations, then the best."""
    size = f.EXPERTS // len(group_scores)
    held = {expert // size for expert, strength in strengths.items() if strength == 1}
    order = sorted(range(len(group_scores)), key=lambda group: (group not in held, -group_scores[group]))
    return order[:count]


def in_groups(groups: list[int], size: int = 2) -> list[int]:
    return [group * size + member for group in groups for member in range(size)]


def softmax_topk(z: Tensor, strengths: dict[int, float], *, normalised: bool) -> dict[int, float]:
    shares = torch.softmax(z, dim=-1)
    chosen = best(z, f.TOP_K, strengths, list(range(f.EXPERTS)))
    total = sum(float(shares[expert]) for expert in chosen) if normalised else 1.0
    return {expert: float(shares[expert]) / total for expert in chosen}


def gpt_oss(z: Tensor, strengths: dict[int, float]) -> dict[int, float]:
    chosen = best(z, f.TOP_K, strengths, list(range(f.EXPERTS)))
    shares = torch.softmax(z[chosen], dim=-1)
    return dict(zip(chosen, shares.tolist(), strict=True))


def deepseek_v2(z: Tensor, strengths: dict[int, float]) -> dict[int, float]:
    shares = torch.softmax(z, dim=-1)
    tops = [max(float(shares[expert]) for expert in in_groups([group])) for group in range(4)]
    pool = in_groups(kept_groups(tops, strengths, 2))
    return {expert: 1.5 * float(shares[expert]) for expert in best(shares, f.TOP_K, strengths, pool)}


def deepseek_v3(z: Tensor, c: Tensor, strengths: dict[int, float]) -> dict[int, float]:
    sums = [sum(float(c[expert]) for expert in in_groups([group])) for group in range(4)]
    chosen = best(c, f.TOP_K, strengths, in_groups(kept_groups(sums, strengths, 2)))
    shares = torch.sigmoid(z)
    total = sum(float(shares[expert]) for expert in chosen)
    return {expert: 2.5 * float(shares[expert]) / total for expert in chosen}


def phimoe(z: Tensor, strengths: dict[int, float], jitter: float = 0.01) -> dict[int, float]:
    """Sparsemixer: the best, with its share among the scores near it; then again without it."""
    weights: dict[int, float] = {}
    candidates = list(range(f.EXPERTS))
    for _ in range(f.TOP_K):
        winner = max(candidates, key=lambda expert: float(z[expert]))
        top = float(z[winner])
        near = [e for e in candidates if (top - float(z[e])) / max(abs(float(z[e])), top) <= 2 * jitter]
        weights[winner] = math.exp(top) / sum(math.exp(float(z[expert])) for expert in near)
        candidates.remove(winner)
    return weights


def expected_weights(name: str, router: nn.Module, hidden: Tensor, strengths: dict[int, float]) -> dict:
    """{expert: weight} for one token by the family's rule on edited scores."""
    raw = router.weight.detach().double() @ hidden.double()
    if name == "gpt_oss":
        raw = raw + router.bias.detach().double()
    z = edited(raw, strengths, torch.float32)
    match name:
        case "gpt_oss":
            return gpt_oss(z, strengths)
        case "qwen3_moe" | "mixtral":
            return softmax_topk(z, strengths, normalised=True)
        case "olmoe":
            return softmax_topk(z, strengths, normalised=False)
        case "deepseek_v2":
            return deepseek_v2(z, strengths)
        case "deepseek_v3":
            c = torch.sigmoid(raw) + router.e_score_correction_bias.double()
            return deepseek_v3(z, edited(c, strengths, torch.float32), strengths)
        case "phimoe":
            return phimoe(z, strengths)
    raise AssertionError(name)


STRENGTHS: list[dict[int, float]] = [
    {},
    {5: 1.0},
    {5: -1.0},
    {3: 0.5, 6: -0.5},
    {1: 1.0, 4: 1.0},
    {0: 1.0, 3: 0.75, 6: -0.9},
    {7: 0.3, 2: -1.0, 4: -0.2},
]


@pytest.mark.parametrize("name", f.FAMILIES)
def test_choice_and_weights_follow_the_familys_own_rule(name: str) -> None:
    model = f.shared(name)
    router = f.router_of(model, LAYER)
    for strengths in STRENGTHS:
        activate = {LAYER: {expert: size for expert, size in strengths.items() if size > 0}}
        deactivate = {LAYER: {expert: -size for expert, size in strengths.items() if size < 0}}
        plan = Steering.from_experts(model, activate, deactivate)
        step = steered_step(model, plan) if strengths else f.choices(model, LAYER, lambda: model(BATCH))
        for token in range(len(step.chosen)):
            expected = expected_weights(name, router, step.hidden[token], strengths)
            seen = dict(zip(step.chosen[token].tolist(), step.weights[token].tolist(), strict=True))
            assert seen.keys() == expected.keys(), (strengths, token)
            for expert, weight in expected.items():
                assert seen[expert] == pytest.approx(weight, rel=2e-4, abs=1e-6), (strengths, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_raw_scores_are_edited_and_those_of_unnamed_experts_are_not(name: str, dtype: torch.dtype) -> None:
    model = f.shared(name, dtype=dtype)
    strengths = {5: 1.0, 1: -1.0, 3: 0.5, 6: -0.25}
    plan = Steering.from_experts(model, {LAYER: {5: 1.0, 3: 0.5}}, {LAYER: {1: 1.0, 6: 0.25}})
    step = steered_step(model, plan)
    raw, _, _ = f.unsteered(f.router_of(model, LAYER), step)
    assert step.scores.dtype == raw.dtype
    unnamed = [0, 2, 4, 7]
    assert torch.equal(step.scores[:, unnamed], raw[:, unnamed])
    for token in range(len(raw)):
        expected = edited(raw[token], strengths, raw.dtype)
        torch.testing.assert_close(
            step.scores[token].double(), expected, rtol=torch.finfo(raw.dtype).eps * 2, atol=1e-5
        )


def test_correction_bias_of_unnamed_experts_still_decides() -> None:
    """Where selection has a bias, an activated expert takes one place and the rest is the model's choice."""
    model = f.shared("deepseek_v3")
    plan = Steering.from_experts(model, {LAYER: [5]})
    step = steered_step(model, plan)
    router = f.router_of(model, LAYER)
    selection = torch.sigmoid(f.unsteered(router, step)[0]) + router.e_score_correction_bias
    for token, row in enumerate(selection.tolist()):
        sums = [row[2 * group] + row[2 * group + 1] for group in range(4)]
        sums[2] = math.inf  # the group of expert 5
        kept = sorted(range(4), key=lambda group: -sums[group])[:2]
        others = [expert for expert in in_groups(kept) if expert != 5]
        other = max(others, key=lambda expert: row[expert])
        edited_row = edited(torch.tensor(row), {5: 1.0}, torch.float32).tolist()
        sums = [edited_row[2 * group] + edited_row[2 * group + 1] for group in (0, 1, 3)]
        assert (0, 1, 3)[sums.index(max(sums))] in kept
        assert sorted(step.chosen[token].tolist()) == sorted([5, other])


def test_soft_strength_changes_some_choices_not_all() -> None:
    model = f.shared("qwen3_moe")
    plan = Steering.from_experts(model, {LAYER: [5]}, strength=0.3)
    step = steered_step(model, plan)
    share = step.has(5).float().mean()
    before = (f.unsteered(f.router_of(model, LAYER), step)[2] == 5).any(dim=-1).float().mean()
    assert before < share < 1


# --------------------------------------------------------------------------- limits are refused


@pytest.mark.parametrize("name", f.FAMILIES)
def test_plans_that_could_break_the_promise_are_refused(name: str) -> None:
    model = f.shared(name)
    with pytest.raises(PlanError, match="layer 2: 3 experts activated, but the router chooses 2"):
        Steering.from_experts(model, {LAYER: [0, 1, 2]})
    with pytest.raises(PlanError, match="left alive"):
        Steering.from_experts(model, None, {LAYER: list(range(7))})
    if name in f.GROUPED:
        with pytest.raises(PlanError, match="1 expert left alive in 2 groups"):
            Steering.from_experts(model, None, {LAYER: [0, 1, 2]})


def test_a_router_with_groups_refuses_activations_in_too_many_of_them() -> None:
    model = f.tiny("deepseek_v3", num_experts_per_tok=3)
    with pytest.raises(PlanError, match="3 groups, but the router keeps 2"):
        Steering.from_experts(model, {LAYER: [0, 2, 4]})
    # E=8, 4 groups, topk_group=2, k=3, one dead in each group: two live experts for three places.
    with pytest.raises(PlanError, match="2 experts left alive in 2 groups"):
        Steering.from_experts(model, None, {LAYER: ONE_DEAD_IN_EACH_GROUP})
    allowed = Steering.from_experts(model, {LAYER: [0, 1, 2]}, {LAYER: [3, 4]})
    assert_promise(steered_step(model, allowed), [0, 1, 2], [3, 4])


@pytest.mark.parametrize("name", f.GROUPED)
def test_groups_that_are_all_kept_do_not_limit(name: str) -> None:
    model = f.tiny(name, n_group=1, topk_group=1)
    plan = Steering.from_experts(model, {LAYER: [0, 7]}, {LAYER: [1, 2, 3, 4]})
    assert_promise(steered_step(model, plan), [0, 7], [1, 2, 3, 4])


def test_deepseek_v2_without_groups() -> None:
    model = f.tiny("deepseek_v2", topk_method="greedy")
    plan = Steering.from_experts(model, {LAYER: [2, 6]}, {LAYER: [0, 1, 4, 5]})
    assert_promise(steered_step(model, plan), [2, 6], [0, 1, 4, 5])


# --------------------------------------------------------------------------- nothing, exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_nothing_planned_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = f.shared(name, dtype=dtype)
    ids, mask = f.padded([7, 4], "left")
    some = Steering.from_experts(model, {LAYER: [5]}, {LAYER: [1]})
    plans = [
        Steering.from_experts(model),
        0 * some,
        Steering.from_experts(model, {LAYER: {5: 0.0}}, {LAYER: {1: 0.0}}, scope="answer"),
    ]
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for plan in plans:
            with plan.apply(model):
                assert torch.equal(model(ids, attention_mask=mask).logits, before)
                again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
                assert torch.equal(again, text)
        with apply_rows(model, [None, None]):
            assert torch.equal(model(ids, attention_mask=mask).logits, before)
        with apply_rows(model, [None, 0 * some]):
            assert torch.equal(model(ids, attention_mask=mask).logits, before)
        with some.apply(model):
            assert not torch.equal(model(ids, attention_mask=mask).logits, before)
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", f.FAMILIES)
def test_rows_follow_their_own_plan_as_if_alone(name: str, implementation: str) -> None:
    """Unsteered rows: the edited layer and those before it to the bit, what follows within 1e-5."""
    model = f.shared(name, implementation=implementation)
    ids, mask = f.padded([7, 7, 7], "left")
    first = Steering.from_experts(model, {1: [5]}, {1: [2]})
    third = Steering.from_experts(model, {1: [3]}, {2: [6, 7]}, scope="answer")

    def run() -> tuple[Tensor, tuple[Tensor, ...], f.Step]:
        with f.watching(model, 1) as steps, torch.no_grad():
            output = model(ids, attention_mask=mask, output_hidden_states=True)
        return output.logits, output.hidden_states, steps[0]

    base_logits, base_states, base_step = run()
    with apply_rows(model, [first, None, third]) as receipt:
        logits, states, step = run()
    assert receipt.tokens == {"router:1": 8, "router:2": 1}
    assert torch.equal(states[0], base_states[0])
    assert torch.equal(states[1], base_states[1])  # the states before the edited layer
    middle = slice(7, 14)
    for seen, before in ((step.scores, base_step.scores), (step.weights, base_step.weights)):
        assert torch.equal(seen[middle], before[middle])
    assert torch.equal(step.chosen[middle], base_step.chosen[middle])
    if implementation == "batched_mm":  # the others share products among rows, and round by their size
        assert torch.equal(states[2][1], base_states[2][1])
    torch.testing.assert_close(logits[1], base_logits[1], rtol=0, atol=1e-5)
    assert bool(step.has(5)[:7].all())
    assert step.has(3)[14:].tolist()[-1] is True
    for row, plan in ((0, first), (2, third)):
        with plan.apply(model), torch.no_grad():
            alone = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-5)
        assert not torch.allclose(logits[row], base_logits[row], atol=1e-4)


def test_changes_are_counted_where_the_chosen_set_differs() -> None:
    for name in f.FAMILIES:
        model = f.shared(name)
        plan = Steering.from_experts(model, {1: [5], 2: [3]}, scope="answer")
        ids, mask = f.padded([6, 4], "left")
        steps: dict[int, list[f.Step]] = {}
        for layer in (1, 2):
            with plan.apply(model, receipt="changes") as receipt, f.watching(model, layer) as steps[layer]:
                model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        expected = {}
        for layer in (1, 2):
            before = [f.unsteered(f.router_of(model, layer), step)[2] for step in steps[layer]]
            pairs = zip(steps[layer], before, strict=True)
            expected[f"router:{layer}"] = sum(int((~f.same_sets(s.chosen, b)).sum()) for s, b in pairs)
        assert receipt.changed == expected
        assert all(0 < count <= 8 for count in expected.values())
        assert receipt.tokens == {"router:1": 8, "router:2": 8}


def test_a_plan_of_no_consequence_changes_nothing() -> None:
    """Strength 1 for the experts that a token chooses anyway: counted as applied, not as a change."""
    model = f.shared("gpt_oss")
    ids = f.token_ids(1, 1)
    step = f.choices(model, LAYER, lambda: model(ids))
    plan = Steering.from_experts(model, {LAYER: step.chosen[0].tolist()})
    with plan.apply(model, receipt="changes") as receipt, torch.no_grad():
        model(ids)
    assert receipt.tokens == {"router:2": 1}
    assert receipt.changed == {"router:2": 0}
    with plan.apply(model) as receipt, torch.no_grad():
        model(ids)
    assert receipt.changed is None


# --------------------------------------------------------------------------- what cannot be steered


def test_tokens_packed_away_from_their_rows_are_refused() -> None:
    """A model that drops tokens before its routers leaves no way to tell which token is which."""
    model = f.tiny("qwen3_moe")
    plan = Steering.from_experts(model, {LAYER: [5]})
    router = f.router_of(model, LAYER)
    handle = router.register_forward_pre_hook(lambda module, args: (args[0][1:],))
    with (
        pytest.raises(SteeringNotApplied, match=r"router:2 was given 35 tokens .* given 36"),
        plan.apply(model),
    ):
        model(BATCH)
    handle.remove()


def test_a_router_whose_code_is_not_as_known_is_refused() -> None:
    """Routing that no longer passes through top-k must not be taken for steered."""
    model = f.tiny("qwen3_moe")
    plan = Steering.from_experts(model, {LAYER: [5]})
    router = f.router_of(model, LAYER)

    def by_sorting(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.nn.functional.linear(hidden.reshape(-1, f.WIDTH), router.weight)
        order = scores.argsort(dim=-1, descending=True)[:, : router.top_k]
        return scores, scores.gather(-1, order).softmax(dim=-1), order

    router.forward = by_sorting
    with pytest.raises(SteeringNotApplied, match="router:2 did not run as known"), plan.apply(model):
        model(BATCH)


@pytest.mark.parametrize("name", f.FAMILIES)
def test_a_model_offloaded_by_accelerate(name: str) -> None:
    """Its weights are on the meta device until a module runs."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain = f.shared(name)
    plan = Steering.from_experts(plain, {LAYER: [5]}, {LAYER: {1: 0.5}})
    expected = steered_step(plain, plan)
    model = accelerate.cpu_offload(f.tiny(name), execution_device="cpu")
    assert f.router_of(model, LAYER).weight.is_meta
    theirs = f.router_of(model, LAYER).__dict__["forward"]
    with plan.apply(model, match="architecture", receipt="changes") as receipt:
        step = f.choices(model, LAYER, lambda: model(BATCH))
    assert torch.equal(step.chosen, expected.chosen)
    assert_promise(step, [5], [])
    assert receipt.tokens == {"router:2": 36}
    assert f.router_of(model, LAYER).__dict__["forward"] is theirs
