"""Applying plans: who is steered, in which block, row and thread; what is put back; what is refused."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, TextIteratorStreamer

import families as f
from steersman import (
    ArchitectureMismatch,
    PlanError,
    Steering,
    SteeringNotApplied,
    WeightsMismatch,
    apply_rows,
    compose,
)
from waiting import HANGING

LAYER = 1
IDS = f.token_ids(2, 6)


@pytest.fixture
def model() -> nn.Module:
    return f.tiny("qwen3_moe")


def plan_for(model: nn.Module, *experts: int, layer: int = LAYER, **options: Any) -> Steering:
    return Steering.from_experts(model, {layer: list(experts)}, **options)


def logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything on a model's modules that applying could leave behind."""
    return {
        f"{name}:{kind}": list(value.items()) if "hooks" in kind else value
        for name, module in model.named_modules()
        for kind, value in module.__dict__.items()
        if "hooks" in kind or callable(value)
    }


# --------------------------------------------------------------------------- restoration


@pytest.mark.parametrize("name", f.FAMILIES)
def test_a_block_leaves_nothing_behind(name: str) -> None:
    model = f.tiny(name)
    before, output = traces(model), logits(model)
    plan = plan_for(model, 5)
    with plan.apply(model):
        assert not torch.equal(logits(model), output)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert traces(model) != before
    assert traces(model) == before
    assert torch.equal(logits(model), output)


def test_an_error_inside_the_block_passes_through_and_leaves_nothing(model: nn.Module) -> None:
    before, output = traces(model), logits(model)
    with pytest.raises(ZeroDivisionError), plan_for(model, 5).apply(model):
        raise ZeroDivisionError
    assert traces(model) == before

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), plan_for(model, 5).apply(model):
        logits(model)
    handle.remove()
    assert traces(model) == before
    assert torch.equal(logits(model), output)


def test_keyboard_interrupt_leaves_nothing(model: nn.Module) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    before = traces(model)
    handle = model.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), plan_for(model, 5).apply(model):
        logits(model)
    handle.remove()
    assert traces(model) == before


def test_a_forward_that_failed_leaves_no_roles_behind(model: nn.Module) -> None:
    """After an error inside a forward that the caller survives, layers called alone are still refused."""
    handle = model.model.layers[2].register_forward_pre_hook(lambda *args: 1 / 0)
    with plan_for(model, 5).apply(model) as receipt:
        with pytest.raises(ZeroDivisionError):
            logits(model)
        assert receipt.tokens == {"router:1": 0}
        with pytest.raises(SteeringNotApplied, match="outside a forward"):
            f.block_of(model, LAYER)(torch.randn(2, 6, f.WIDTH))
        handle.remove()
        logits(model)
        assert receipt.tokens == {"router:1": 12}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_blocks_close_in_any_order(model: nn.Module, order: tuple[int, ...]) -> None:
    before, base = traces(model), logits(model)
    plans = [plan_for(model, 5), plan_for(model, 3, layer=2), plan_for(model, 1, layer=0)]
    blocks = [plan.apply(model) for plan in plans]
    for block in blocks:
        block.__enter__()
    open_plans = dict(enumerate(plans))
    for number in order:
        assert torch.equal(logits(model), alone(compose(*open_plans.values())))
        blocks[number].__exit__(None, None, None)
        del open_plans[number]
    assert torch.equal(logits(model), base)
    assert traces(model) == before


def alone(plan: Steering) -> Tensor:
    """What a plan gives on a fresh copy of the model."""
    model = f.shared("qwen3_moe")
    with plan.apply(model):
        return logits(model)


def test_exit_stack(model: nn.Module) -> None:
    before = traces(model)
    with contextlib.ExitStack() as stack:
        plans = [plan_for(model, 5, layer=1), plan_for(model, 3, layer=2)]
        receipts = [stack.enter_context(plan.apply(model)) for plan in plans]
        logits(model)
    assert [receipt.tokens for receipt in receipts] == [{"router:1": 12}, {"router:2": 12}]
    assert traces(model) == before


def wrapped(module: nn.Module, calls: list[str], name: str) -> Callable[..., Any]:
    """Someone else's wrapper around a module's forward, as accelerate installs them."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return inner(*args, **kwargs)

    module.forward = forward
    return forward


def test_someone_elses_wrapper_from_before_is_put_back(model: nn.Module) -> None:
    calls: list[str] = []
    router = f.router_of(model, LAYER)
    theirs = wrapped(router, calls, "before")
    with plan_for(model, 5).apply(model):
        step = f.choices(model, LAYER, lambda: model(IDS))
        assert bool(step.has(5).all())
    assert calls.count("before") >= 1
    assert router.__dict__["forward"] is theirs


def test_someone_elses_wrapper_from_inside_the_block_stays_and_works(model: nn.Module) -> None:
    calls: list[str] = []
    base = logits(model)
    router = f.router_of(model, LAYER)
    plan = plan_for(model, 5)
    with plan.apply(model):
        theirs = wrapped(router, calls, "inside")
        assert bool(f.choices(model, LAYER, lambda: model(IDS)).has(5).all())
    assert router.__dict__["forward"] is theirs
    assert torch.equal(logits(model), base)
    with plan.apply(model):  # and again, around theirs
        assert bool(f.choices(model, LAYER, lambda: model(IDS)).has(5).all())
    assert router.__dict__["forward"] is theirs
    assert torch.equal(logits(model), base)
    assert len(calls) == 4


def test_a_model_can_be_collected_after_its_blocks() -> None:
    model = f.tiny("deepseek_v3")
    first, second = plan_for(model, 5), plan_for(model, 3, layer=2)
    with first.apply(model, receipt="changes") as receipt, second.apply(model) as other:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert receipt.tokens == {"router:1": 16}
    assert other.tokens == {"router:2": 16}


def test_a_model_can_be_collected_after_a_failed_block() -> None:
    model = f.tiny("qwen3_moe")
    plan = plan_for(model, 5)
    handle = model.model.layers[2].register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with plan.apply(model):
            logits(model)
    except ZeroDivisionError:
        pass
    handle.remove()
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


def test_a_block_is_for_one_use(model: nn.Module) -> None:
    block = plan_for(model, 5).apply(model)
    with block:
        logits(model)
    with pytest.raises(PlanError, match="opened before"), block:
        pass


# --------------------------------------------------------------------------- nesting


def test_nested_blocks_append(model: nn.Module) -> None:
    outer, inner = plan_for(model, 5, strength=0.4), plan_for(model, 5, 3, strength=0.4)
    with outer.apply(model) as first, inner.apply(model) as second:
        nested = logits(model)
    assert torch.equal(nested, alone(outer + inner))
    assert not torch.equal(nested, alone(outer))
    assert first.tokens == second.tokens == {"router:1": 12}


def test_nested_blocks_that_contradict_each_other_are_refused(model: nn.Module) -> None:
    before = traces(model)
    against = Steering.from_experts(model, None, {LAYER: [5]})
    with plan_for(model, 5).apply(model):
        with pytest.raises(PlanError, match="layer 1, expert 5"):
            against.apply(model).__enter__()
        with pytest.raises(PlanError, match="3 experts activated"):
            plan_for(model, 1, 2).apply(model).__enter__()
        step = f.choices(model, LAYER, lambda: model(IDS))
        assert bool(step.has(5).all())
    assert traces(model) == before


def test_rows_nest_in_a_plan_for_all(model: nn.Module) -> None:
    everyone, own = plan_for(model, 5), plan_for(model, 3)
    with everyone.apply(model) as receipt, apply_rows(model, [own, None]) as rows:
        step = f.choices(model, LAYER, lambda: model(IDS))
    assert bool(step.has(5).all())
    assert step.has(3).reshape(2, 6).all(dim=1).tolist() == [True, False]
    assert receipt.tokens == {"router:1": 12}
    assert rows.tokens == {"router:1": 6}


def test_edits_of_a_plan_count_each_token_once(model: nn.Module) -> None:
    plan = plan_for(model, 5, strength=0.5) + plan_for(model, 5, strength=0.5, scope="prompt")
    plan = plan + plan_for(model, 3, scope="answer", strength=0.5)
    with plan.apply(model) as receipt:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert receipt.tokens == {"router:1": 2 * (6 + 3)}


def test_overlapping_scopes_add_up_where_they_overlap(model: nn.Module) -> None:
    """0.5 for the prompt and 0.5 for the answer meet at the last prompt token: there it is a full 1."""
    plan = plan_for(model, 5, strength=0.5, scope="prompt") + plan_for(model, 5, strength=0.5, scope="answer")
    with plan.apply(model), f.watching(model, LAYER) as steps:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    raw = f.unsteered(f.router_of(model, LAYER), steps[0])[0]
    top = raw.amax(dim=-1)
    moved = torch.minimum(raw[:, 5] + raw.std(dim=-1, correction=0), top + 0.01)
    expected = torch.where(torch.arange(12) % 6 == 5, top + 0.01, moved)
    torch.testing.assert_close(steps[0].scores[:, 5], expected, rtol=0, atol=1e-5)
    assert bool(steps[0].has(5)[[5, 11]].all())


# --------------------------------------------------------------------------- forwards outside generate


def positions(model: nn.Module, steps: list[f.Step]) -> list[list[list[int]]]:
    """Columns that were edited, by forward and row."""
    found = []
    for step in steps:
        raw = f.unsteered(f.router_of(model, LAYER), step)[0]
        edited = (step.scores[:, 5] != raw[:, 5]).reshape(step.shape)
        found.append([row.nonzero().flatten().tolist() for row in edited])
    return found


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        ("prompt", [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        ("answer", [[5], [5]]),
    ],
)
def test_a_plain_forward_is_all_prompt(model: nn.Module, scope: str, expected: list[list[int]]) -> None:
    ids, mask = f.padded([4, 6], "left")
    with plan_for(model, 5, scope=scope).apply(model) as receipt, f.watching(model, LAYER) as steps:
        logits(model, ids, attention_mask=mask)
    assert positions(model, steps) == [expected]
    assert receipt.tokens == {"router:1": sum(map(len, expected))}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        ("prompt", [[2, 3, 4], [0, 1]]),
        ("generated", [[5], [2, 3, 4, 5]]),
        ("answer", [[4, 5], [1, 2, 3, 4, 5]]),
    ],
)
@pytest.mark.parametrize("form", ["2-D", "4-D", "4-D additive"])
def test_prompt_lengths(model: nn.Module, scope: str, expected: list[list[int]], form: str) -> None:
    ids, mask = f.padded([4, 6], "left")
    given = mask
    if form != "2-D":
        given = (torch.ones(6, 6).bool().tril() & mask.bool()[:, None, :])[:, None]
    if form == "4-D additive":
        given = torch.where(given, 0.0, torch.finfo(torch.float32).min)
    plan = plan_for(model, 5, scope=scope)
    with plan.apply(model, prompt_lengths=[3, 2]) as receipt, f.watching(model, LAYER) as steps:
        logits(model, ids, attention_mask=given)
    assert positions(model, steps) == [expected]
    assert receipt.tokens == {"router:1": sum(map(len, expected))}


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "answer"])
def test_a_loop_of_ones_own_with_prompt_lengths(model: nn.Module, scope: str) -> None:
    ids, mask = f.padded([3, 5], "left")
    ids = torch.cat([ids, f.token_ids(2, 3, seed=5)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 3).long()], dim=1)
    cache = DynamicCache()
    plan = plan_for(model, 5, scope=scope)
    with plan.apply(model, prompt_lengths=[3, 5]) as receipt, f.watching(model, LAYER) as steps:
        for start, end in ((0, 2), (2, 5), (5, 6), (6, 8)):
            logits(model, ids[:, start:end], attention_mask=mask[:, :end], **{f.CACHE: cache}, use_cache=True)
    prompt, last = scope in ("all", "prompt"), scope != "generated"
    fed_back = scope != "prompt"
    expected = [
        [[], [0, 1] if prompt else []],
        [[0, 1] * prompt + [2] * last, [0, 1] * prompt + [2] * last],
        [[0] * fed_back] * 2,
        [[0, 1] if fed_back else []] * 2,
    ]
    assert positions(model, steps) == expected
    assert receipt.tokens == {"router:1": sum(len(row) for rows in expected for row in rows)}


def test_a_loop_of_ones_own_without_prompt_lengths_is_all_prompt(model: nn.Module) -> None:
    cache = DynamicCache()
    with plan_for(model, 5, scope="answer").apply(model) as receipt, f.watching(model, LAYER) as steps:
        logits(model, IDS, **{f.CACHE: cache}, use_cache=True)
        logits(model, IDS[:, :1], **{f.CACHE: cache}, use_cache=True)
    assert positions(model, steps) == [[[5], [5]], [[0], [0]]]
    assert receipt.tokens == {"router:1": 4}


def test_inputs_embeds_and_the_decoder_itself(model: nn.Module) -> None:
    embeds = model.get_input_embeddings()(IDS).detach()
    with plan_for(model, 5).apply(model) as receipt, torch.no_grad():
        model(inputs_embeds=embeds)
        model.model(IDS)
        model.model(input_ids=IDS)
    assert receipt.tokens == {"router:1": 36}
    with plan_for(model.model, 5).apply(model.model) as receipt, torch.no_grad():
        model.model(IDS)
    assert receipt.tokens == {"router:1": 12}


def test_a_block_on_the_decoder_and_one_on_the_model(model: nn.Module) -> None:
    """The second block knows `generate`, so it must be followed though the first block came without it."""
    before = traces(model)
    inner = plan_for(model.model, 3, layer=2, scope="answer")
    with inner.apply(model.model) as first, plan_for(model, 5, scope="prompt").apply(model) as second:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert first.tokens == {"router:2": 8}
    assert second.tokens == {"router:1": 12}
    assert traces(model) == before


def test_bad_options_are_refused(model: nn.Module) -> None:
    plan = plan_for(model, 5)
    for options in (
        {"match": "name"},
        {"threads": "mine"},
        {"receipt": "everything"},
        {"prompt_lengths": [0, 3]},
    ):
        with pytest.raises(PlanError):
            plan.apply(model, **options)
    with pytest.raises(PlanError, match="plan or None"):
        apply_rows(model, [])
    block = plan.apply(model, prompt_lengths=[3])
    with pytest.raises(SteeringNotApplied, match="1 entry for 2 rows"), block:
        logits(model)


# --------------------------------------------------------------------------- not applied


def under(plan: Steering, model: nn.Module, work: Callable[[], Any], **options: Any) -> None:
    """Open a block, do something in it, close it."""
    with plan.apply(model, **options):
        work()


def test_a_block_without_a_forward_raises(model: nn.Module) -> None:
    plan = plan_for(model, 5)
    other = f.shared("qwen3_moe", seed=3)
    with pytest.raises(SteeringNotApplied, match="without a steered forward"):
        under(plan, model, lambda: None)
    with pytest.raises(SteeringNotApplied, match="without a steered forward"):
        under(plan, model, lambda: logits(other))
    under(Steering.from_experts(model), model, lambda: None)  # an empty plan asks for nothing


def test_only_the_outer_block_ran(model: nn.Module) -> None:
    inner = plan_for(model, 3, layer=2)
    with plan_for(model, 5).apply(model):
        logits(model)
        with pytest.raises(SteeringNotApplied, match="without a steered forward"):
            under(inner, model, lambda: None)


def test_a_block_that_goes_around_its_router_raises(model: nn.Module) -> None:
    block = f.block_of(model, LAYER)
    plan = plan_for(model, 5)
    block.forward = lambda hidden: hidden * 0.5
    with pytest.raises(SteeringNotApplied, match="not run in this forward: router:1"):
        under(plan, model, lambda: logits(model))


def test_a_router_replaced_after_entering_raises(model: nn.Module) -> None:
    router = f.router_of(model, LAYER)
    plan = plan_for(model, 5)

    def replace() -> None:
        router.forward = type(router).forward.__get__(router)
        logits(model)

    def delete() -> None:
        del router.forward
        logits(model)

    with pytest.raises(SteeringNotApplied, match="not run in this forward: router:1"):
        under(plan, model, replace)
    del router.forward
    with pytest.raises(SteeringNotApplied, match="not run in this forward: router:1"):
        under(plan, model, delete)
    assert "forward" not in router.__dict__


def test_the_output_of_an_unsteered_forward_is_never_returned(model: nn.Module) -> None:
    """Raised from within the forward: even a caller who catches it has no output."""
    router = f.router_of(model, LAYER)
    block = plan_for(model, 5).apply(model)
    receipt = block.__enter__()
    router.forward = type(router).forward.__get__(router)
    with pytest.raises(SteeringNotApplied):
        logits(model)
    with pytest.raises(SteeringNotApplied):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    with pytest.raises(SteeringNotApplied, match="without a steered forward"):
        block.__exit__(None, None, None)
    assert receipt.tokens == {"router:1": 0}


def test_layers_called_around_the_decoder_raise(model: nn.Module) -> None:
    hidden = torch.randn(2, 6, f.WIDTH)
    positions = model.model.rotary_emb(hidden, torch.arange(6)[None])
    with plan_for(model, 5).apply(model):
        logits(model)
        with pytest.raises(SteeringNotApplied, match="outside a forward"):
            model.model.layers[1](hidden, position_embeddings=positions)
        logits(model)
    model.model.layers[1](hidden, position_embeddings=positions)


def test_a_decoders_forward_without_its_hooks_is_steered_too(model: nn.Module) -> None:
    with plan_for(model, 5).apply(model) as receipt, torch.no_grad():
        called = model.model(IDS).last_hidden_state
        assert torch.equal(model.model.forward(IDS).last_hidden_state, called)
    assert set(receipt.tokens.values()) == {2 * IDS.numel()}


# --------------------------------------------------------------------------- another model


def test_another_architecture_or_other_weights(model: nn.Module) -> None:
    plan = plan_for(model, 5)
    others = {
        "family": f.shared("mixtral"),
        "experts": f.tiny("qwen3_moe", num_experts=16),
        "top-k": f.tiny("qwen3_moe", num_experts_per_tok=3),
        "flag": f.tiny("qwen3_moe", norm_topk_prob=False),
        "dense": f.dense(),
    }
    for other in others.values():
        before = traces(other)
        for match in ("weights", "architecture"):
            with pytest.raises(ArchitectureMismatch, match=r"qwen3_moe \(width 32, 3 layers"):
                plan.apply(other, match=match).__enter__()
        assert traces(other) == before
    sibling = f.tiny("qwen3_moe", seed=7)
    before = traces(sibling)
    with pytest.raises(WeightsMismatch, match='match="architecture"'):
        plan.apply(sibling).__enter__()
    with pytest.raises(WeightsMismatch):
        apply_rows(sibling, [None, plan]).__enter__()
    assert traces(sibling) == before
    with plan.apply(sibling, match="architecture") as receipt:
        step = f.choices(sibling, LAYER, lambda: sibling(IDS))
    assert bool(step.has(5).all())
    assert receipt.match == "architecture"
    assert receipt.to_json()["match"] == "architecture"


def test_plans_of_two_architectures_for_the_rows_of_one_batch(model: nn.Module) -> None:
    other = plan_for(f.shared("mixtral"), 5)
    with pytest.raises(ArchitectureMismatch):
        apply_rows(model, [plan_for(model, 5), other]).__enter__()


# --------------------------------------------------------------------------- threads


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in another thread; its result, or its error raised here."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = work()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(HANGING)
    assert not thread.is_alive()
    if "error" in box:
        raise box["error"]
    return box["result"]


def test_other_threads_run_unsteered_with_one_warning(model: nn.Module) -> None:
    base = logits(model)
    text = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with plan_for(model, 5).apply(model) as receipt, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steered = logits(model)
        assert torch.equal(in_thread(lambda: logits(model)), base)
        again = in_thread(lambda: model.generate(IDS, max_new_tokens=4, do_sample=False))
        assert torch.equal(again, text)
        assert torch.equal(logits(model), steered)
    ours = [w for w in caught if "unsteered in a thread" in str(w.message)]
    assert len(ours) == 1
    assert not torch.equal(steered, base)
    assert receipt.tokens == {"router:1": 24}


def test_a_block_whose_forwards_ran_in_another_thread_raises(model: nn.Module) -> None:
    plan = plan_for(model, 5)
    with (
        pytest.warns(UserWarning, match="unsteered in a thread"),
        pytest.raises(SteeringNotApplied, match="without a steered forward"),
    ):
        under(plan, model, lambda: in_thread(lambda: logits(model)))


def test_all_threads_covers_a_streamer(model: nn.Module) -> None:
    plan = plan_for(model, 5, scope="answer")
    with plan.apply(model):
        expected = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)

    class Decoder:
        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(f"{int(token)} " for token in ids)

    streamer = TextIteratorStreamer(Decoder(), skip_prompt=True, timeout=HANGING)
    with plan.apply(model, threads="all") as receipt, warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"max_new_tokens": 5, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join(HANGING)
    assert [int(token) for token in text.split()] == expected[0, 6:].tolist()
    assert receipt.tokens == {"router:1": 5}


def test_two_plans_in_two_threads_on_one_model(model: nn.Module) -> None:
    plans = [plan_for(model, 5), Steering.from_experts(model, {2: [3]}, {LAYER: [1]}, scope="answer")]
    expected = []
    for plan in plans:
        with plan.apply(model):
            expected.append(model.generate(IDS, max_new_tokens=6, do_sample=False))
    assert not torch.equal(*expected)
    before = traces(model)
    together = threading.Barrier(2, timeout=HANGING)
    results: list[list[Tensor]] = [[], []]
    tokens: list[dict[str, int]] = [{}, {}]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(6):
                together.wait()
                with plans[number].apply(model) as receipt:
                    results[number].append(model.generate(IDS, max_new_tokens=6, do_sample=False))
                tokens[number] = receipt.tokens
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGING)
    assert errors == []
    for number in range(2):
        assert all(torch.equal(result, expected[number]) for result in results[number])
    assert tokens == [{"router:1": 22}, {"router:1": 12, "router:2": 12}]
    assert traces(model) == before


def test_an_empty_plan_in_one_thread_beside_a_plan_in_another(model: nn.Module) -> None:
    base = logits(model)

    def empty() -> Tensor:
        with Steering.from_experts(model).apply(model):
            return logits(model)

    with plan_for(model, 5).apply(model):
        steered = logits(model)
        assert torch.equal(in_thread(empty), base)
        assert torch.equal(logits(model), steered)
