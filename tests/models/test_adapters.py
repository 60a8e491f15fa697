"""PEFT: under adapters plans hold, and adapters are weights; one on a router is refused until merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import families as f
import ways as w
from steersman import PlanError, SteeringNotApplied, WeightsMismatch, weights_id
from steersman.concepts.states import block_outputs
from steersman.models.architecture import find_routers, read_architecture

peft = pytest.importorskip("peft", reason="peft is not installed")

ATTENTION = {
    "olmoe": ["q_proj", "v_proj"],
    "gpt_oss": ["q_proj", "v_proj"],
    "deepseek_v3": ["q_a_proj", "o_proj"],
}
ROUTER = {"olmoe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight", "deepseek_v3": "mlp.gate.weight"}
by_family = pytest.mark.parametrize("name", w.WAYS_FAMILIES)


def adapted(model: Any, seed: int = 0, **options: Any) -> Any:
    """A model under a LoRA that changes what it computes."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": [], **options})
    return peft.get_peft_model(model, config).eval()


def of_attention(name: str, model: Any = None) -> Any:
    return adapted(model if model is not None else f.tiny(name), target_modules=ATTENTION[name])


@by_family
def test_steered_through_the_wrapper_and_through_the_model_inside(name: str) -> None:
    wrapped = of_attention(name)
    inside = wrapped.get_base_model()
    plan = w.plan_of(wrapped)
    before = w.logits(wrapped)
    assert not torch.equal(before, w.logits(f.shared(name)))  # the adapter does something
    expected = w.steered(wrapped, plan, inside)
    assert torch.equal(w.steered(inside, w.plan_of(inside), match="architecture"), expected)
    with plan.apply(wrapped) as receipt:
        through = w.written(wrapped)
        assert torch.equal(w.written(inside), through)
    with plan.apply(inside):
        assert torch.equal(w.written(inside), through)
    assert receipt.tokens == {f"router:{layer}": 2 * (w.IDS.numel() + 3 * len(w.IDS)) for layer in w.LAYERS}
    assert torch.equal(w.logits(wrapped), before)
    assert (w.counts(wrapped).activations == w.counts(inside).activations).all()
    assert read_architecture(wrapped).id == read_architecture(f.shared(name)).id


def test_vectors_and_states_are_those_of_the_adapted_model() -> None:
    bare, wrapped = f.shared("olmoe"), of_attention("olmoe")
    plan = w.vectors_of(wrapped)
    with pytest.raises(WeightsMismatch, match="adapter default"), w.vectors_of(bare).apply(wrapped):
        pass
    with plan.apply(wrapped) as receipt:
        through = w.written(wrapped)
        assert torch.equal(w.written(wrapped.get_base_model()), through)
    assert receipt.tokens == {"block_output:1": 2 * 4 * len(w.IDS)}
    states, ids = block_outputs(wrapped, [1], w.IDS.tolist())[1], w.IDS.tolist()
    plain = block_outputs(bare, [1], ids)[1]
    assert not torch.equal(states, plain)
    with plan.apply(wrapped):
        edited = block_outputs(wrapped, [1], ids)[1]
    torch.testing.assert_close(edited[:, -1], states[:, -1] + 2.0 * w.vector_of(bare), rtol=0, atol=1e-5)
    assert torch.equal(edited[:, :-1], states[:, :-1])
    with wrapped.disable_adapter():
        assert torch.equal(block_outputs(wrapped, [1], ids)[1], plain)


@by_family
@pytest.mark.parametrize("made", ["in memory", "from a checkpoint"])
def test_an_active_adapter_is_other_weights(name: str, made: str, tmp_path: Path) -> None:
    plain = f.shared(name)
    model = f.tiny(name)
    if made == "from a checkpoint":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped = of_attention(name, model)
    plan = w.plan_of(plain)
    with pytest.raises(WeightsMismatch, match="runs with the adapter default"), plan.apply(wrapped):
        pass
    w.steered(wrapped, plan, wrapped.get_base_model(), match="architecture")
    with wrapped.disable_adapter():  # the plain model again, to the bit
        assert weights_id(wrapped) == weights_id(plain)
        assert torch.equal(w.steered(wrapped, plan, wrapped.get_base_model()), w.steered(plain, plan))
    made_for_it = w.plan_of(wrapped)
    with pytest.raises(WeightsMismatch), made_for_it.apply(plain):
        pass


def test_the_same_adapter_is_the_same_weights(tmp_path: Path) -> None:
    wrapped = of_attention("olmoe")
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(f.tiny("olmoe"), tmp_path)
    assert weights_id(again) == weights_id(wrapped) == weights_id(wrapped.get_base_model())
    by_transformers = f.tiny("olmoe")
    by_transformers.load_adapter(str(tmp_path))
    assert weights_id(by_transformers) == weights_id(wrapped)
    w.steered(again, w.plan_of(wrapped), again.get_base_model())
    other = adapted(f.tiny("olmoe"), seed=1, target_modules=ATTENTION["olmoe"])
    assert weights_id(other) != weights_id(wrapped)
    stronger = adapted(f.tiny("olmoe"), target_modules=ATTENTION["olmoe"], lora_alpha=64)
    assert weights_id(stronger) != weights_id(wrapped)


def test_another_adapter_of_the_model_is_noticed() -> None:
    wrapped = of_attention("olmoe")
    plan = w.plan_of(wrapped)
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    w.steered(wrapped, plan, wrapped.get_base_model())  # it is not active
    wrapped.set_adapter("other")
    with pytest.raises(WeightsMismatch, match="adapter other"), plan.apply(wrapped):
        pass


@by_family
def test_merged_it_is_a_model_of_its_own(name: str) -> None:
    wrapped = of_attention(name)
    apart, plain = weights_id(wrapped), weights_id(f.shared(name))
    expected = w.steered(wrapped, w.plan_of(wrapped), wrapped.get_base_model())
    merged = wrapped.merge_and_unload()
    assert weights_id(merged) not in (apart, plain)
    output = w.steered(merged, w.plan_of(merged))
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


@by_family
def test_an_adapter_on_the_experts(name: str) -> None:
    wrapped = adapted(f.tiny(name), target_parameters=["mlp.experts.gate_up_proj"])
    plan = w.plan_of(wrapped)
    assert [site.facts.reason for site in find_routers(wrapped)] == [None] * len(f.moe_layers(name))
    with plan.apply(wrapped, receipt="changes") as receipt:
        w.logits(wrapped)
        chosen = w.counts(wrapped)
    row = {layer: chosen.layers.index(layer) for layer in w.LAYERS}
    assert (chosen.rates[:, row[1], w.ON] == 1).all()
    assert (chosen.rates[:, row[2], w.OFF] == 0).all()
    assert receipt.changed is not None
    assert receipt.changed["router:1"] > 0


@by_family
@pytest.mark.parametrize("way", ["its parameter", "a trained copy"])
def test_an_adapter_on_the_router_is_refused_until_merged(name: str, way: str) -> None:
    model = f.tiny(name)
    plan = w.plan_of(model)
    if way == "its parameter":
        wrapped = adapted(model, target_parameters=[ROUTER[name]])
    else:
        wrapped = adapted(model, target_modules=ATTENTION[name], modules_to_save=[ROUTER[name].split(".")[1]])
    with pytest.raises(PlanError, match="merge_and_unload"), plan.apply(wrapped, match="architecture"):
        pass
    merged = wrapped.merge_and_unload()
    w.steered(merged, w.plan_of(merged))
    w.steered(merged, plan, match="architecture")


def test_prompt_tuning_is_refused_while_generating() -> None:
    """Its learned tokens come before the prompt, and would shift every role."""
    wrapped = peft.get_peft_model(
        f.tiny("olmoe"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    plan = w.plan_of(f.shared("olmoe"))
    with pytest.raises(WeightsMismatch, match="prompt tokens"), plan.apply(wrapped):
        pass
    with pytest.raises(SteeringNotApplied), plan.apply(wrapped, match="architecture"):
        w.written(wrapped)
