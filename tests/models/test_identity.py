"""Which weights a model has: the same id in memory, in files, in any dtype; another for other weights."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import families as f
from concepts import twins
from steersman import (
    ModelError,
    RoutingContrast,
    Steering,
    WeightsMismatch,
    load_model,
    merge_contrasts,
    weights_id,
)
from steersman.concepts.transplant_check import resolve_target
from steersman.models import digest_cache, digests
from steersman.models.digests import id_by_sample
from steersman.models.identity import _identity
from steersman.models.same_weights import same_weights


def load(folder: Path, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def wide_llama() -> nn.Module:
    """A small Llama whose matrices are much longer than a sample of them."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=576,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def embeddings(model: nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight


@pytest.mark.parametrize("name", f.FAMILIES)
def test_same_in_memory_and_from_the_files_in_any_dtype(name: str, tmp_path: Path) -> None:
    model = f.tiny(name)
    before = weights_id(model)
    assert re.fullmatch(r"bytes-sha256:[0-9a-f]{64}", before)
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


# ---------------------------------------------------------------- every byte


def zero_rows(weight: torch.Tensor) -> None:
    weight[100:140].zero_()


def one_row(weight: torch.Tensor) -> None:
    weight[300] = weight[300].flip(0)


def one_bit(weight: torch.Tensor) -> None:
    middle = weight.view(torch.int32).view(-1)
    middle[middle.numel() // 2 + 3] ^= 1


@pytest.mark.parametrize("change", [zero_rows, one_row, one_bit])
def test_what_a_sample_misses_changes_the_id(change: Callable[[torch.Tensor], None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = wide_llama()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        change(model.model.layers[0].mlp.gate_proj.weight if change is zero_rows else embeddings(model))
    model.save_pretrained(tmp_path / "after")
    before, after = load(tmp_path / "before"), load(tmp_path / "after")
    assert _identity(before, id_by_sample) == _identity(after, id_by_sample)  # as ids were before
    assert weights_id(before) != weights_id(after)


def test_dtypes_with_the_same_bytes_are_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = wide_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    for parameter in model.parameters():
        parameter.data = parameter.data.view(torch.float16)
    model.save_pretrained(tmp_path / "float16")
    ids = [weights_id(load(tmp_path / name, dtype="auto")) for name in ("bfloat16", "float16")]
    assert len(set(ids)) == 2


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose bytes are read, with a cache that keeps files of any size and age."""
    names: list[str] = []
    original = digests._sha256

    def counted(tensor: Any, progressed: Any) -> str:
        names.append(tensor.name)
        return original(tensor, progressed)

    monkeypatch.setattr(digests, "_sha256", counted)
    monkeypatch.setattr(digest_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(digest_cache, "SETTLED_NS", 0)
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path / "cache"))
    return names


def saved(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    wide_llama().save_pretrained(folder, **options)
    return folder


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path, hashed: list[str]) -> None:
    checkpoint = saved(tmp_path / "model", max_shard_size="200KB")
    first = weights_id(load(checkpoint))
    assert hashed
    hashed.clear()
    assert weights_id(load(checkpoint)) == first
    assert not hashed
    file = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-4097] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size, time and inode are as they were
    assert weights_id(load(checkpoint)) != first
    assert 0 < len(hashed) < len(load(checkpoint).state_dict())  # the other files are not read again


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"tensors"', '"tensor"'),
        lambda text: re.sub(r"[0-9a-f]{64}", "0" * 64, text, count=1),
    ],
)
def test_a_damaged_cache_is_as_none(damage: Callable[[str], str], tmp_path: Path, hashed: list[str]) -> None:
    checkpoint = saved(tmp_path / "model")
    first = weights_id(load(checkpoint))
    (kept,) = (tmp_path / "cache" / "weights").iterdir()
    kept.write_text(damage(kept.read_text()))
    hashed.clear()
    assert weights_id(load(checkpoint)) == first
    assert hashed


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(tmp_path / "model")
    (tmp_path / "file").write_text("")
    first = weights_id(load(checkpoint))
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path / "file"))
    assert weights_id(load(checkpoint)) == first


def test_a_file_that_changed_just_now_is_not_kept(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write may give it the same times: file systems count them coarsely."""
    monkeypatch.setattr(digest_cache, "SETTLED_NS", 3600 * 10**9)
    weights_id(load(saved(tmp_path / "model")))
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- ids of earlier versions

OLD = Path(__file__).parent.parent / "data"


def test_an_id_by_sample_is_recomputed_and_taken_with_a_warning() -> None:
    model, _ = load_model("lab:moe")
    plan = Steering.from_pretrained(OLD / "sampled-id-plan")
    assert ":" not in plan.weights_id
    with ExitStack() as block:
        with pytest.warns(UserWarning, match="by a sample of their bytes: it agrees, which does not prove"):
            block.enter_context(plan.apply(model))
        model(torch.ones(1, 4, dtype=torch.long))
    again = replace(plan, weights_id=weights_id(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with again.apply(model):
            model(torch.ones(1, 4, dtype=torch.long))


def test_an_old_plan_of_vectors_steers_as_it_did() -> None:
    model, _ = load_model("lab:source")
    plan = Steering.from_pretrained(OLD / "sampled-id-vector")
    tokens = torch.ones(1, 4, dtype=torch.long)
    plain = model(tokens).logits
    with ExitStack() as block:
        with pytest.warns(UserWarning, match="by a sample"):
            receipt = block.enter_context(plan.apply(model))
        assert not torch.equal(model(tokens).logits, plain)
    assert receipt.fingerprint == plan.fingerprint


def test_an_id_by_sample_of_other_weights_is_refused() -> None:
    plan = Steering.from_pretrained(OLD / "sampled-id-plan")
    model, _ = load_model("lab:moe")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(WeightsMismatch):
        plan.apply(model).__enter__()


def test_old_and_new_plans_of_one_model_compose_to_one_with_the_stronger_id() -> None:
    model, _ = load_model("lab:moe")
    old = Steering.from_pretrained(OLD / "sampled-id-plan")
    new = replace(Steering.from_experts(model, {0: [2]}), model="lab:moe")
    for one, other in ((old, new), (new, old)):
        with pytest.warns(UserWarning, match="by a sample"):
            both = one + other
        assert both.weights_id == weights_id(model)
    assert (old + old).weights_id == old.weights_id
    foreign = replace(new, weights_id="bytes-sha256:" + "0" * 64)
    with pytest.raises(WeightsMismatch, match="not at hand to tell"):
        replace(old, model="gone") + replace(foreign, model="")


def test_old_and_new_contrasts_of_one_model_merge() -> None:
    model, _ = load_model("lab:moe")
    old = RoutingContrast.from_pretrained(OLD / "sampled-id-contrast")
    new = replace(old, weights_id=weights_id(model), cluster_ids=old.cluster_ids + 1)
    with pytest.warns(UserWarning, match="by a sample"):
        assert merge_contrasts([old, new]).weights_id == weights_id(model)


def test_an_old_concept_and_map_go_with_the_model() -> None:
    """Of twins in memory, whose names no artifact has: what is at hand decides."""
    bridge, concept = twins.bridge(), twins.concept()
    old = replace(bridge, target=replace(bridge.target, weights_id=_identity(twins.target(), id_by_sample)))
    with pytest.warns(UserWarning, match="the map was saved by an earlier version"):
        resolve_target(old, (twins.target(), twins.tokenizer()))
    assert same_weights(concept, bridge.source)
