"""Edits in float16 that make numbers it does not hold: refused where made; the model's own are not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import families as f
from steersman import Steering, SteeringNotApplied, apply_rows
from steersman.models.architecture import decoder_layers

IDS = f.token_ids(2, 6)
PAST = "float16, which ends at 65504.*bfloat16 or float32"


class Louder(nn.Module):
    """A layer whose states are `size` more in every number, of the rows with a token."""

    def __init__(self, inner: nn.Module, size: float) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, hidden: Tensor) -> Any:
        return self.inner(hidden) + self.size


def half(name: str = "olmoe", **louder: float) -> Any:
    """A model in float16; `mlp_0=6e4` makes the states of layer 0 so large."""
    model = f.dense().half() if name == "dense" else f.tiny(name, dtype=torch.float16)
    model.generation_config.eos_token_id = None
    for place, size in louder.items():
        layer = decoder_layers(model)[int(place.removeprefix("mlp_"))]
        layer.mlp = Louder(layer.mlp, size)
    return model


def plan_of(model: nn.Module, sizes: dict[int, float], **options: Any) -> Steering:
    width = model.config.hidden_size
    vectors = {layer: torch.full((width,), size) for layer, size in sizes.items()}
    return Steering.from_vectors(model, vectors, **{"scope": "all", **options})


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def refused(plan: Steering, model: Any, **options: Any) -> str:
    with pytest.raises(SteeringNotApplied, match=PAST) as caught, plan.apply(model):
        logits(model, **options)
    return str(caught.value)


def test_a_vector_and_a_state_that_fit_where_their_sum_does_not() -> None:
    model = half(mlp_0=6e4)
    told = refused(plan_of(model, {0: 1e4}), model)
    assert told.startswith("block_output:0: 60000 and what the plan adds to it, up to 10000,")
    with plan_of(model, {0: 5e3}).apply(model):
        assert logits(model).isfinite().all()


def test_two_layers_that_fit_alone() -> None:
    model = half()
    for layer in (0, 1):
        with plan_of(model, {layer: 4e4}).apply(model):
            assert logits(model).isfinite().all()
    assert refused(plan_of(model, {0: 4e4, 1: 4e4}), model).startswith("block_output:1: 40000 and")
    with plan_of(model, {0: 4e4}).apply(model):
        assert refused(plan_of(model, {1: 4e4}), model).startswith("block_output:1")


def test_a_projection() -> None:
    model = half(mlp_1=0.0)
    width = model.config.hidden_size
    states = torch.full((width,), 4e4)
    states[1::2] *= -1
    decoder_layers(model)[1].mlp.size = states.half()
    direction = -states.sign()
    direction[0] *= -12
    plan = Steering.from_vectors(model, {1: direction}, operation="project", scope="all")
    assert "block_output:1: 40" in refused(plan, model)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("scope", ["answer", "all", "generated"])
def test_generate_gives_an_error_instead_of_an_answer(scope: Any, drawn: bool) -> None:
    model = half()
    plan = plan_of(model, {0: 4e4, 2: 4e4}, scope=scope)
    with pytest.raises(SteeringNotApplied, match="block_output:2"), plan.apply(model):
        model.generate(IDS, max_new_tokens=4, do_sample=drawn)
    with plan_of(model, {0: 4e4}, scope=scope).apply(model) as receipt:
        model.generate(IDS, max_new_tokens=4, do_sample=drawn)
    assert all(receipt.tokens.values())


def test_padded_prompts() -> None:
    model, ids = half(), IDS.clone()
    ids[0, :3], mask = 0, torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(SteeringNotApplied, match=PAST), plan_of(model, {0: 4e4, 1: 4e4}).apply(model):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_layers_after_the_edit() -> None:
    model = half(mlp_2=2e4)
    told = refused(plan_of(model, {1: 5e4}), model)
    assert told.startswith("layer 1: states of up to 5")
    assert "layer after it do not: run" in told
    for plan in (plan_of(model, {1: 5e4}, scope="answer"), plan_of(model, {1: 5e4}, scope="generated")):
        with pytest.raises(SteeringNotApplied, match="layer 1: states of up to"), plan.apply(model):
            model.generate(IDS, max_new_tokens=4)
    with plan_of(model, {1: 3e4}).apply(model):
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("place", ["mlp_0", "mlp_1", "mlp_2"])
def test_a_model_that_overflows_by_itself_is_not_blamed_on_the_plan(place: str) -> None:
    model = half(**{place: float("inf")})
    plan = plan_of(model, {1: 1.0})
    with plan.apply(model) as receipt:
        assert not logits(model).isfinite().any()
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert receipt.tokens == {"block_output:1": IDS.numel() * 2 + 2 * 2}


def test_rows() -> None:
    """An unsteered row that overflows by itself is not the plan's doing; a steered one beside it is."""
    model = half()
    layer = decoder_layers(model)[0]
    layer.mlp = Louder(layer.mlp, 0.0)
    layer.mlp.size = torch.tensor([float("inf"), 0.0], dtype=torch.float16)[:, None, None]
    quiet, loud = plan_of(model, {1: 10.0}), plan_of(model, {0: 4e4, 1: 4e4})
    with apply_rows(model, [None, quiet]):
        found = logits(model)
    assert found[1].isfinite().all()
    assert not found[0].isfinite().any()
    for plans in ([None, loud], [quiet, loud]):
        with pytest.raises(SteeringNotApplied, match="block_output:1: 4"), apply_rows(model, plans):
            logits(model)


class One(nn.Module):
    """A norm that gives 1 in the first number of each state and 0 in the others."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden).index_fill(-1, torch.tensor([0]), 1.0)


def scored(name: str, layer: int, size: float) -> Any:
    """A model in float16 whose router gives `size` to experts 0 to 2 of every token, and 0 to the others."""
    model = f.tiny(name, dtype=torch.float16)
    router = f.router_of(model, layer)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.weight[:3] = size
    decoder_layers(model)[layer].post_attention_layernorm = One()
    return model


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("strength", [1.0, -1.0, 0.999])
def test_scores_of_routers(name: str, strength: float) -> None:
    """The bound lies outside the scores by 4 · eps of them: beyond float16 where they reach its end."""
    layer = f.moe_layers(name)[0]
    for size, fits in ((65504.0, False), (60000.0, True)):
        model = scored(name, layer, size if strength > 0 else -size)
        chosen = {layer: {5: abs(strength)}}
        plan = Steering.from_experts(model, **{"activate" if strength > 0 else "deactivate": chosen})
        with plan.apply(model) if fits else nullcontext():
            logits(model)
        if not fits:
            with (
                pytest.raises(SteeringNotApplied, match=f"router:{layer}: 65504 and the plan's"),
                plan.apply(model),
            ):
                logits(model)


@pytest.mark.parametrize("compiled", ["whole", "in place"])
def test_compiled_code(compiled: str) -> None:
    torch._dynamo.reset()
    model = half("dense", mlp_2=2e4)
    first, after = plan_of(model, {0: 4e4, 1: 4e4}), plan_of(model, {1: 5e4})
    options: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}
    outer = model
    if compiled == "whole":
        outer = torch.compile(model, **options)
    else:
        model.compile(**options)
    with plan_of(model, {1: 3e4}).apply(outer):
        assert logits(outer).isfinite().all()
    assert refused(first, outer).startswith(
        "block_output:1: 40000 and what the plan adds to it, up to 40000,"
    )
    assert refused(after, outer).startswith("layer 1: states of up to 5")
    assert logits(outer).isfinite().all()
    torch._dynamo.reset()


def test_compiled_routers() -> None:
    torch._dynamo.reset()
    model = scored("olmoe", 0, 65504.0)
    plan = Steering.from_experts(model, {0: [5]})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(SteeringNotApplied, match="router:0: 65504 and"), plan.apply(compiled):
        logits(compiled)
    torch._dynamo.reset()


def test_offloaded_layers_and_autocast() -> None:
    loud = {0: 4e4, 1: 4e4}
    offloaded = half()
    plan = plan_of(offloaded, loud)
    cpu_offload(offloaded)
    refused(plan, offloaded)
    model = f.tiny("olmoe")
    with torch.autocast("cpu", torch.float16), plan_of(model, {0: 10.0}).apply(model):
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_numbers_are_not_looked_at(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f.tiny("olmoe", dtype=dtype)
    monkeypatch.setattr("steersman.models.overflow.overflown", None)
    both = plan_of(model, {0: 4e4, 1: 4e4}) + Steering.from_experts(model, {0: [5]})
    with both.apply(model):
        assert logits(model).isfinite().all()
