"""Plans under torch.compile: whole graphs, made once for all plans; nothing runs unsteered in silence."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families as f
from steersman import Steering, SteeringNotApplied, apply_rows

IDS = f.token_ids(2, 9)


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.made += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _from_scratch() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outer(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(fullgraph=True, backend=backend)
    return model


def its_forward(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    return model


def its_decoder(model: nn.Module, backend: Any) -> nn.Module:
    model.model = torch.compile(model.model, fullgraph=True, backend=backend)
    return model


def each_layer(model: nn.Module, backend: Any) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    return model


WAYS = (outer, in_place, its_forward, its_decoder, each_layer)


def plans_of(model: nn.Module, name: str) -> dict[str, Steering | None]:
    first, last = (1, 2) if name in f.GROUPED else (0, 1)
    return {
        "none": None,
        "one": Steering.from_experts(model, {last: [5]}, {last: [1]}),
        "another": Steering.from_experts(model, {last: [0]}, {last: [3, 6]}),
        "another layer": Steering.from_experts(model, {first: [2]}),
        "soft": Steering.from_experts(model, {last: [0]}, {first: [4]}, strength=0.5),
    }


def logits(model: nn.Module, plan: Steering | None, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        if plan is None:
            return model(ids, use_cache=False).logits
        with plan.apply(model) as receipt:
            output = model(ids, use_cache=False).logits
        assert set(receipt.tokens.values()) == {ids.numel()}
        return output


CASES: list[Any] = [
    ("olmoe", outer),
    ("gpt_oss", its_forward),
    ("deepseek_v3", outer),
    *(
        pytest.param(name, way, marks=pytest.mark.long)
        for name in ("olmoe", "gpt_oss", "deepseek_v3", "phimoe")
        for way in WAYS
    ),
]


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_plans_are_switched_without_compiling_again(name: str, way: Callable[..., nn.Module]) -> None:
    model = f.tiny(name, num_hidden_layers=3 if name in f.GROUPED else 2)
    plans = plans_of(model, name)
    expected = {title: logits(model, plan) for title, plan in plans.items()}
    assert len({value.sum().item() for value in expected.values()}) == len(expected)
    graphs = Graphs()
    compiled = way(model, graphs)
    steered_graphs = 0
    for title in ("none", "one", "another", "another layer", "soft", "none", "another", "one"):
        assert torch.allclose(logits(compiled, plans[title]), expected[title], atol=1e-5), title
        if title == "one" and not steered_graphs:
            steered_graphs = graphs.made
    assert graphs.made == steered_graphs, "a plan was compiled anew"


def test_rows_with_their_own_plans_and_other_shapes() -> None:
    model = f.tiny("olmoe", num_hidden_layers=2)
    plans = plans_of(model, "olmoe")
    one, another = plans["one"], plans["another"]
    ids = f.token_ids(3, 7, seed=3)
    with torch.no_grad(), apply_rows(model, [one, None, another]):
        expected = model(ids).logits
    compiled = outer(model, Graphs())
    logits(compiled, one)
    with torch.no_grad(), apply_rows(compiled, [one, None, another]) as receipt:
        assert torch.allclose(compiled(ids).logits, expected, atol=1e-5)
    assert receipt.tokens == {"router:1": 14}


def test_a_compiled_model_generates_as_steered() -> None:
    model = f.tiny("olmoe", num_hidden_layers=2)
    plan = plans_of(model, "olmoe")["one"]
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    with plan.apply(model) as receipt:
        expected = model.generate(IDS, **settings)
    compiled = its_forward(model, Graphs())
    with plan.apply(compiled) as again:
        assert torch.equal(compiled.generate(IDS, **settings), expected)
    assert again.tokens == receipt.tokens


@pytest.mark.long
def test_code_compiled_around_the_model_is_steered_or_fails() -> None:
    model = f.tiny("olmoe", num_hidden_layers=1)
    plan = Steering.from_experts(model, {0: [5]})
    expected = logits(model, plan)

    def step(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    whole = torch.compile(step, backend=Graphs(), fullgraph=True)
    parts = torch.compile(step, backend=Graphs())
    with torch.no_grad():
        whole(IDS)  # their code is there before the plan
        parts(IDS)
        with plan.apply(model) as receipt:
            assert torch.allclose(parts(IDS), expected, atol=1e-5)
            with pytest.raises((torch._dynamo.exc.Unsupported, SteeringNotApplied)):
                whole(IDS)
    assert receipt.tokens == {"router:0": IDS.numel()}


@pytest.mark.filterwarnings("ignore:a model is running unsteered")
def test_a_thread_without_a_plan_runs_unsteered_beside_one_with_it() -> None:
    model = f.tiny("olmoe", num_hidden_layers=2)
    plan = plans_of(model, "olmoe")["one"]
    expected = {"unsteered": logits(model, None), "steered": logits(model, plan)}
    compiled = outer(model, Graphs())
    seen: list[Tensor] = []
    with torch.no_grad(), plan.apply(compiled):
        steered = compiled(IDS, use_cache=False).logits
        thread = threading.Thread(target=lambda: seen.append(logits(compiled, None)))
        thread.start()
        thread.join()
        again = compiled(IDS, use_cache=False).logits
    assert torch.allclose(seen[0], expected["unsteered"], atol=1e-5)
    assert torch.allclose(steered, expected["steered"], atol=1e-5)
    assert torch.equal(again, steered)


def test_changes_are_not_counted_in_compiled_code() -> None:
    model = f.tiny("olmoe", num_hidden_layers=2)
    plan = plans_of(model, "olmoe")["one"]
    compiled = outer(model, Graphs())
    with pytest.raises(SteeringNotApplied, match="not compiled"), plan.apply(compiled, receipt="changes"):
        compiled(IDS)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_generated_code_follows_plans(name: str) -> None:
    model = f.tiny(name)
    plans = plans_of(model, name)
    expected = {title: logits(model, plan) for title, plan in plans.items()}
    compiled = torch.compile(model, fullgraph=True)
    for title, plan in plans.items():
        assert torch.allclose(logits(compiled, plan), expected[title], atol=1e-5), title


def test_nothing_stays_behind() -> None:
    model = f.tiny("olmoe", num_hidden_layers=2)
    plan = plans_of(model, "olmoe")["one"]
    compiled = outer(model, Graphs())
    before = {name: set(module.__dict__) for name, module in compiled.named_modules()}
    unsteered = logits(compiled, None)
    logits(compiled, plan)
    assert {name: set(module.__dict__) for name, module in compiled.named_modules()} == before
    assert torch.equal(logits(compiled, None), unsteered)
