"""bitsandbytes, 8 and 4 bit, on the processor: the plan of the plain checkpoint holds, also where the gate
itself is quantised.

Every matrix has sizes that all of its kernels take: where a processor has AVX512-BF16, 4-bit weights are
packed at the first forward, in blocks of 32 rows and 64 columns, and the product is computed in bfloat16.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import every_family as e
import families as f
import streams
import ways as w
from steersman import ModelError, Steering, WeightsMismatch, load_model, weights_id
from steersman.concepts.states import block_outputs
from steersman.models.architecture import decoder_layers, find_routers, read_architecture

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

BITS = {
    # bitsandbytes 0.50 fails at DeepSeek's kv_b_proj on the processor, with or without a plan.
    "8 bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "kv_b_proj"]),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
GATED = ("afmoe", "gemma4_text", "hunyuan_v1_moe")
"""Families whose router holds a plain linear layer, which is quantised with all others."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "kv_lora_rank": 64,
    "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
GATED_SIZES = {
    **SIZES, "head_dim": 16, "hidden_size_per_layer_input": 64,
    **dict.fromkeys(e.EXPERTS_NAMES, 32), **dict.fromkeys(e.TOP_K_NAMES, 8),
}  # fmt: skip
"""The gate's rows are experts."""

by_bits = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        yield


def tiny(name: str, **options: Any) -> Any:
    """A tiny model of a family with sizes that can be quantised anywhere."""
    if name in GATED:
        return e.tiny(name, **GATED_SIZES, **options)
    known = f.config_of(name).to_dict()
    sizes = {**SIZES, "head_dim": 16} if name == "gpt_oss" else SIZES
    return f.tiny(name, **{size: value for size, value in sizes.items() if size in known}, **options)


def quantised(plain: Any, bits: str, folder: Path) -> Any:
    """A checkpoint of a model, loaded into 8 or 4 bits, that runs without a plan."""
    plain.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[bits], device_map="cpu")
    model.generation_config.eos_token_id = None
    assert any(
        isinstance(m, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit) for m in model.modules()
    )
    try:
        w.logits(model)
    except Exception as error:
        pytest.skip(
            f"bitsandbytes {bitsandbytes.__version__} does not run {bits} without a plan here: {error}"
        )
    return model


@pytest.mark.parametrize("name", [*w.WAYS_FAMILIES, *GATED])
def test_every_kernel_takes_the_sizes(name: str, tmp_path: Path) -> None:
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu  # what a processor with AVX512-BF16 does
    model = quantised(tiny(name), "4 bit", tmp_path)
    weights = [m.weight for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert weights
    for weight in weights:
        state = copy.deepcopy(weight.quant_state)
        if not getattr(state, "packing_format_for_cpu", False):  # it has been packed, where it can be run
            pack(weight.data.clone(), state)


@by_bits
@pytest.mark.parametrize("name", w.WAYS_FAMILIES)
def test_the_plan_of_the_checkpoint_holds(name: str, bits: str, tmp_path: Path) -> None:
    plain = tiny(name)
    plan = w.plan_of(plain)
    model = quantised(plain, bits, tmp_path)
    before = w.logits(model)
    assert not torch.equal(before, w.logits(plain))  # it is quantised
    assert read_architecture(model).id == plan.architecture_id
    assert weights_id(model) == plan.weights_id  # the same checkpoint, in another number format
    assert not torch.equal(w.steered(model, plan), before)
    assert w.plan_of(model).fingerprint == plan.fingerprint
    with plan.apply(model) as receipt:
        w.written(model)
    assert receipt.tokens == {f"router:{layer}": w.IDS.numel() + 3 * len(w.IDS) for layer in w.LAYERS}
    assert torch.equal(w.logits(model), before)
    check_vectors(plain, model)
    chosen = w.counts(model)
    assert (chosen.activations.sum(-1) == f.TOP_K * chosen.tokens[:, None]).all()


def check_vectors(plain: Any, model: Any) -> None:
    """A vector is added to what the quantised layers give, and states are read as they give them."""
    plan, before = w.vectors_of(plain), w.logits(model)
    with streams.watching(decoder_layers(model)) as stream, plan.apply(model) as receipt:
        w.logits(model)
        w.written(model)
    last = torch.arange(w.IDS.shape[1]).expand(2, -1) == w.IDS.shape[1] - 1
    streams.assert_added(stream, w.vector_of(model), [last, last, *[torch.ones(2, 1, dtype=torch.bool)] * 3])
    assert receipt.tokens == {"block_output:1": 10}
    states = block_outputs(model, [1], w.IDS.tolist())[1]
    assert torch.equal(states, stream.raw[0])
    assert not torch.equal(states, block_outputs(plain, [1], w.IDS.tolist())[1])
    assert torch.equal(w.logits(model), before)


@by_bits
@pytest.mark.parametrize("name", GATED)
def test_a_quantised_gate(name: str, bits: str, tmp_path: Path) -> None:
    plain = tiny(name)
    layer = next(site.facts.layer for site in find_routers(plain) if site.facts.reason is None)
    model = quantised(plain, bits, tmp_path)
    gate = next(site for site in find_routers(model) if site.facts.layer == layer).quantised_gate
    assert type(gate).__name__ in ("Linear8bitLt", "Linear4bit")
    before = w.logits(model)
    plan = Steering.from_experts(plain, {layer: [5]}, {layer: [1, 2]})
    with plan.apply(model, receipt="changes") as receipt, e.watching(model) as seen:
        steered = w.logits(model)
    assert (seen[layer] == 5).any(-1).all()
    assert not ((seen[layer] == 1) | (seen[layer] == 2)).any()
    assert receipt.tokens == {f"router:{layer}": w.IDS.numel()}
    assert receipt.changed is not None
    assert receipt.changed[f"router:{layer}"] > 0
    assert not torch.equal(steered, before)
    softly = Steering.from_experts(plain, {layer: {5: 0.8}})
    with softly.apply(model):
        assert not torch.equal(w.logits(model), before)
    assert torch.equal(w.logits(model), before)


@by_bits
def test_other_weights_are_refused(bits: str, tmp_path: Path) -> None:
    plan = w.plan_of(tiny("olmoe"))
    other = quantised(tiny("olmoe", seed=5), bits, tmp_path)
    with pytest.raises(WeightsMismatch), plan.apply(other):
        pass
    w.steered(other, plan, match="architecture")


@by_bits
def test_a_checkpoint_saved_quantised_has_weights_of_its_own(bits: str, tmp_path: Path) -> None:
    plain = tiny("olmoe")
    plan = w.plan_of(plain)
    quantised(plain, bits, tmp_path / "plain").save_pretrained(tmp_path / "quantised")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    with pytest.raises(WeightsMismatch), plan.apply(model):
        pass
    w.steered(model, plan, match="architecture")
    w.steered(model, w.plan_of(model))


@by_bits
def test_a_quantised_checkpoint_opened_by_name(bits: str, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    quantised(tiny("olmoe"), bits, tmp_path / "plain").save_pretrained(folder)
    w.tokenizer().save_pretrained(folder)
    model, _ = load_model(str(folder), device="cpu")
    w.steered(model, w.plan_of(model))


def test_a_change_after_quantising_is_noticed(tmp_path: Path) -> None:
    for name in ("olmoe", "gpt_oss"):
        model = quantised(tiny(name), "4 bit", tmp_path / name)
        plan = w.plan_of(tiny(name))
        with torch.no_grad():
            f.router_of(model, 1).weight.neg_()
        with pytest.raises((WeightsMismatch, ModelError)), plan.apply(model):
            pass
