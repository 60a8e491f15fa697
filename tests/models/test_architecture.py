"""What a model is, read from its modules: routers by layer, rules, groups; what cannot be steered and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Ernie4_5_MoeConfig,
    GraniteMoeConfig,
    JambaConfig,
    PretrainedConfig,
)

import families as f
from steersman import ModelError, PlanError, Router, Steering, read_architecture

RULES = {
    "gpt_oss": "topk-softmax",
    "qwen3_moe": "softmax-topk+renormalised",
    "mixtral": "softmax-topk+renormalised",
    "deepseek_v2": "softmax-topk+groups-max",
    "deepseek_v3": "sigmoid-topk+renormalised+bias+groups-top2",
    "olmoe": "softmax-topk",
    "phimoe": "sparsemixer",
}


@pytest.mark.parametrize("name", f.FAMILIES)
def test_every_family(name: str) -> None:
    architecture = read_architecture(f.shared(name))
    assert architecture.model_type == name
    assert architecture.hidden_size == 32
    assert architecture.layer_count == len(architecture.layers) == 3
    grouped = name in f.GROUPED
    expected = [
        Router(
            layer=layer,
            experts=8,
            top_k=2,
            rule=RULES[name],
            groups=(4, 2) if grouped else None,
            shared_experts=int(grouped),
        )
        for layer in f.moe_layers(name)
    ]
    assert list(architecture.routers) == expected
    assert all(router.steerable for router in architecture.routers)
    if grouped:
        assert architecture.layers[0] is None
        assert [architecture.routers[0].group_of(expert) for expert in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_flags_and_groups_are_part_of_the_rule() -> None:
    def router(name: str, **changes: object) -> Router:
        return read_architecture(f.tiny(name, **changes)).routers[-1]

    assert router("qwen3_moe", norm_topk_prob=False).rule == "softmax-topk"
    assert router("olmoe", norm_topk_prob=True).rule == "softmax-topk+renormalised"
    assert router("deepseek_v3", norm_topk_prob=False).rule == "sigmoid-topk+bias+groups-top2"
    whole = router("deepseek_v3", n_group=1, topk_group=1)
    assert (whole.rule, whole.groups) == ("sigmoid-topk+renormalised+bias", None)
    assert router("deepseek_v3", n_group=2, topk_group=2).groups is None
    greedy = router("deepseek_v2", topk_method="greedy")
    assert (greedy.rule, greedy.groups) == ("softmax-topk", None)
    assert router("deepseek_v3", n_shared_experts=2).shared_experts == 2


def test_layers_are_named_by_their_true_index() -> None:
    sparse = read_architecture(f.tiny("qwen3_moe", mlp_only_layers=[1]))
    assert [None if layer is None else layer.layer for layer in sparse.layers] == [0, None, 2]
    stepped = read_architecture(f.tiny("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4))
    assert [router.layer for router in stepped.routers] == [1, 3]


def test_a_dense_model_has_no_routers() -> None:
    model = f.dense()
    architecture = read_architecture(model)
    assert architecture.routers == ()
    assert architecture.layers == (None, None, None)
    assert architecture.model_type == "llama"
    with pytest.raises(PlanError, match=r"layer 0 has no router \(layers with one: none\)"):
        Steering.from_experts(model, {0: [0]})


SMALL = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
UNKNOWN: dict[str, PretrainedConfig] = {
    "granitemoe": GraniteMoeConfig(
        **SMALL, hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "jamba": JambaConfig(
        **SMALL, hidden_size=32, intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        attn_layer_period=1, attn_layer_offset=0, expert_layer_period=1, expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **SMALL, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, moe_num_experts=4, moe_k=2,
        moe_layer_start_index=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_that_is_not_known_is_named_with_the_reason(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNKNOWN[name])
    for module in model.modules():
        known = type(module)
        if "Router" in known.__name__ or "SparseMoeBlock" in known.__name__:
            module.__class__ = type(f"Novel{known.__name__}", (nn.Module,), dict(known.__dict__))
    architecture = read_architecture(model)
    assert len(architecture.routers) == 2, "a router was passed over in silence"
    for router in architecture.routers:
        assert not router.steerable
        assert router.reason
        with pytest.raises(PlanError, match="cannot be steered"):
            Steering.from_experts(model, {router.layer: [0]})


def test_a_renamed_router_class_is_not_taken_for_a_known_one() -> None:
    model = f.tiny("qwen3_moe")
    router = f.router_of(model, 1)
    known = type(router)
    router.__class__ = type("NovelTopKRouter", (nn.Module,), dict(known.__dict__))
    facts = read_architecture(model).layers[1]
    assert facts is not None
    assert facts.reason == "the routing rule of NovelTopKRouter is not known"
    with pytest.raises(PlanError, match="layer 1 cannot be steered: the routing rule of NovelTopKRouter"):
        Steering.from_experts(model, {1: [5]})
    assert Steering.from_experts(model, {2: [5]}).strengths == {2: {5: 1.0}}
    router.__class__ = type("PatchedTopKRouter", (known,), {})  # derived: as its family's
    assert read_architecture(model) == read_architecture(f.shared("qwen3_moe"))


def test_a_missing_correction_bias_is_a_reason() -> None:
    model = f.tiny("deepseek_v3")
    router = f.router_of(model, 1)
    del router._buffers["e_score_correction_bias"]
    facts = read_architecture(model).layers[1]
    assert facts is not None
    assert facts.reason == "its correction bias e_score_correction_bias is missing"


def test_models_of_another_form_are_refused() -> None:
    with pytest.raises(ModelError, match="no list of decoder layers"):
        read_architecture(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no list of decoder layers"):
        read_architecture(
            AutoModelForCausalLM.from_config(
                BertConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, is_decoder=True
                )
            )
        )


# --------------------------------------------------------------------------- identity


def test_the_id_depends_on_structure_alone(tmp_path: Path) -> None:
    base = read_architecture(f.shared("deepseek_v3")).id
    assert read_architecture(f.tiny("deepseek_v3", seed=3)).id == base
    assert read_architecture(f.tiny("deepseek_v3", dtype=torch.bfloat16)).id == base
    assert read_architecture(f.tiny("deepseek_v3", vocab_size=80)).id == base
    assert read_architecture(f.tiny("deepseek_v3", implementation="eager")).id == base
    assert read_architecture(f.shared("deepseek_v3").model).id == base
    f.shared("deepseek_v3").save_pretrained(tmp_path)
    assert read_architecture(AutoModelForCausalLM.from_pretrained(tmp_path)).id == base
    others = [
        f.tiny("deepseek_v3", n_group=2, topk_group=1),
        f.tiny("deepseek_v3", norm_topk_prob=False),
        f.tiny("deepseek_v3", num_experts_per_tok=3),
        f.tiny("deepseek_v3", n_routed_experts=16),
        f.tiny("deepseek_v3", first_k_dense_replace=2),
        f.tiny("deepseek_v3", num_hidden_layers=4),
        f.tiny("deepseek_v3", hidden_size=48),
    ]
    ids = {read_architecture(model).id for model in others}
    assert len(ids) == len(others)
    assert base not in ids


def test_ids_of_the_families_differ() -> None:
    assert len({read_architecture(f.shared(name)).id for name in f.FAMILIES}) == len(f.FAMILIES)


def test_the_id_is_the_sha256_of_the_documented_form() -> None:
    """Literal: whoever changes the canonical form breaks every plan that was ever saved."""
    layer = ["softmax-topk+renormalised", 8, 2, None]
    form = {"layers": [layer] * 3, "model_type": "qwen3_moe", "width": 32}
    text = json.dumps(form, sort_keys=True, separators=(",", ":"))
    identity = read_architecture(f.shared("qwen3_moe")).id
    assert identity == hashlib.sha256(text.encode()).hexdigest()
    assert identity == "35f9c38a54b253918129599aa1da79b15b12e3b6ce6f865323b046844fbb3501"
