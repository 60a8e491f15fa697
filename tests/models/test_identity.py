"""Which weights a model has: the same id in memory, in files, in any dtype; another for other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import families as f
from steersman import ModelError, Steering, WeightsMismatch, weights_id


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", f.FAMILIES)
def test_same_in_memory_and_from_the_files_in_any_dtype(name: str, tmp_path: Path) -> None:
    model = f.tiny(name)
    before = weights_id(model)
    assert len(before) == 64
    model.save_pretrained(tmp_path)
    assert weights_id(model) == before
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert weights_id(load(tmp_path, dtype)) == before
    assert weights_id(f.tiny(name, seed=1)) != before
    assert weights_id(f.tiny(name)) == before


def test_a_plan_made_before_saving_fits_after_loading(tmp_path: Path) -> None:
    model = f.tiny("deepseek_v3")
    plan = Steering.from_experts(model, {1: [5]})
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch.bfloat16)
    with plan.apply(loaded):
        assert bool(f.choices(loaded, 1, lambda: loaded(f.token_ids(1, 5))).has(5).all())
    again = Steering.from_experts(loaded, {1: [5]})
    assert (again.weights_id, again.fingerprint) == (plan.weights_id, plan.fingerprint)
    assert again.model == str(tmp_path)


def test_sharded_checkpoints_have_the_id_of_the_whole(tmp_path: Path) -> None:
    model = f.tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert weights_id(load(tmp_path / "shards")) == weights_id(load(tmp_path / "whole")) == weights_id(model)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_model_of_a_checkpoints_configuration_has_other_weights(name: str, tmp_path: Path) -> None:
    model = f.tiny(name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert other.config.name_or_path == str(tmp_path)
    assert weights_id(other) != weights_id(load(tmp_path))
    with pytest.raises(WeightsMismatch):
        Steering.from_experts(model, {1: [5]}).apply(other).__enter__()


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "in place": lambda weight: weight.normal_(),
    "through data": lambda weight: weight.data.normal_(),
    "replaced": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
}
TENSORS = {
    "embedding": lambda model: model.get_input_embeddings().weight,
    "attention": lambda model: next(
        p for n, p in model.model.layers[1].self_attn.named_parameters() if n.endswith("o_proj.weight")
    ),
    "router": lambda model: f.router_of(model, 1).weight,
    "experts": lambda model: next(f.block_of(model, 2).experts.parameters()),
    "head": lambda model: model.lm_head.weight,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_one_tensor_changed_in_memory_is_noticed(name: str, tensor: str, change: str, tmp_path: Path) -> None:
    built = f.tiny(name)
    before = weights_id(built)
    built.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert weights_id(loaded) == before
    for model in (built, loaded):
        with torch.no_grad():
            CHANGES[change](TENSORS[tensor](model))
        assert weights_id(model) != before


def test_a_correction_bias_changed_in_memory_is_noticed(tmp_path: Path) -> None:
    built = f.tiny("deepseek_v3")
    before = weights_id(built)
    built.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert weights_id(loaded) == before
    for model in (built, loaded):
        with torch.no_grad():
            f.router_of(model, 1).e_score_correction_bias.normal_()
        assert weights_id(model) != before


def test_damaged_checkpoint_files_are_named(tmp_path: Path) -> None:
    model = f.tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not cut off in place: the loaded model may be mapped to it
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a safetensors file"):
        weights_id(loaded)
    (tmp_path / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors: the safetensors header is damaged"):
        weights_id(loaded)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ModelError, match=r"index\.json: not a safetensors index"):
        weights_id(loaded)


def test_a_checkpoint_overwritten_after_loading_is_not_taken_for_the_model(tmp_path: Path) -> None:
    first = f.tiny("qwen3_moe")
    first.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert weights_id(loaded) == weights_id(first)
    (tmp_path / "model.safetensors").unlink()
    f.tiny("qwen3_moe", seed=9).save_pretrained(tmp_path)
    assert weights_id(loaded) == weights_id(first)


def test_offloaded_weights_are_identified_by_what_accelerate_keeps(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = f.tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    for offloaded in (load(tmp_path), f.tiny("qwen3_moe")):
        assert weights_id(accelerate.cpu_offload(offloaded, execution_device="cpu")) == weights_id(model)
    changed = load(tmp_path)
    f.router_of(changed, 1).weight.data.mul_(-3)
    assert weights_id(accelerate.cpu_offload(changed, execution_device="cpu")) != weights_id(model)


def test_weights_that_are_nowhere_cannot_be_identified() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(f.config_of("qwen3_moe"))
    with pytest.raises(ModelError, match="offloaded and its safetensors checkpoint is not at hand"):
        weights_id(model)
