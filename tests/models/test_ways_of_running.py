"""Every way of running a model: the plan of the plain model holds, nothing else changes, the counts agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import every_family as every
import families as f
import ways as w
from steersman import Steering, WeightsMismatch, weights_id
from steersman.models.architecture import find_routers

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

by_family = pytest.mark.parametrize("name", w.WAYS_FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in w.WAYS_FAMILIES}
    for name, folder in folders.items():
        f.shared(name).save_pretrained(folder, max_shard_size="40KB")
    return folders


def loaded(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.generation_config.eos_token_id = None
    return model


# Offloading by accelerate -----------------------------------------------------------------------------------


def cpu_offload(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder / "offload"), execution_device="cpu")


MAP = {
    **{f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")},
    "model.layers.2": "disk",
    "lm_head": "disk",
}


def placed(model: Any, folder: Path) -> Any:
    """Parts on the processor, parts on disk."""
    return accelerate.dispatch_model(
        model, MAP, main_device="cpu", offload_dir=str(folder / "placed"), force_hooks=True
    )


OFFLOADS = [cpu_offload, disk_offload, placed]


@by_family
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("made", ["in memory", "from a checkpoint"])
def test_offloaded(name: str, offload: Any, made: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = f.tiny(name) if made == "in memory" else loaded(folders[name])
    offloaded = offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    w.check_way(f.shared(name), offloaded)


@by_family
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_while_a_plan_is_attached(name: str, offload: Any, tmp_path: Path) -> None:
    plain, model = f.shared(name), f.tiny(name)
    plan = w.plan_of(plain)
    expected = w.steered(plain, plan)
    with plan.apply(model):
        before = w.logits(model)
        offload(model, tmp_path)
        during = w.logits(model)
    assert torch.equal(before, expected)
    assert torch.equal(during, expected)
    w.check_way(plain, model)


@by_family
def test_loaded_with_a_device_map(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = f.shared(name)
    for device_map in ("cpu", "auto", MAP):
        model = loaded(folders[name], device_map=device_map, offload_folder=str(tmp_path))
        w.check_way(plain, model)
    assert any(parameter.is_meta for parameter in model.parameters())


def test_offloaded_tied_embeddings(tmp_path: Path) -> None:
    plain = f.tiny("olmoe", tie_word_embeddings=True)
    for offload in OFFLOADS:
        model = f.tiny("olmoe", tie_word_embeddings=True)
        assert weights_id(offload(model, tmp_path)) == weights_id(plain)


def test_offloaded_weights_that_are_others_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = w.plan_of(f.shared("olmoe"))
    other = loaded(folders["olmoe"])
    with torch.no_grad():
        f.router_of(other, 2).weight.neg_()
    with pytest.raises(WeightsMismatch), plan.apply(disk_offload(other, tmp_path)):
        pass


# Kernels of transformers' own, numbers, devices -------------------------------------------------------------


@by_family
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_experts_and_attention_implementations(name: str, experts: str, attention: str) -> None:
    if name == "gpt_oss" and attention == "sdpa":
        pytest.skip("gpt_oss has no sdpa attention in transformers: its attention sinks need another kernel")
    model = f.tiny(name, implementation=experts)
    model.set_attn_implementation(attention)
    w.check_way(f.shared(name), model)


@by_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    """The ids are those of the checkpoint, whatever it is loaded as; a model rounded later is another."""
    rounded = f.tiny(name).to(dtype)
    w.check_way(rounded, f.tiny(name).to(dtype))
    model = loaded(folders[name], dtype=dtype)
    plan = w.plan_of(f.shared(name))
    before = w.logits(model)
    assert not torch.equal(w.steered(model, plan), before)
    assert torch.equal(w.logits(model), before)
    assert weights_id(rounded) != plan.weights_id


@by_family
def test_converted_inside_a_block(name: str) -> None:
    model = f.tiny(name)
    plan = w.plan_of(model)
    expected = w.steered(f.tiny(name).half(), plan, match="architecture")
    with plan.apply(model, receipt="changes") as receipt:
        full = w.logits(model)
        assert torch.equal(w.logits(model.half()), expected)
        back = w.logits(model.to("cpu", torch.float32))
        torch.testing.assert_close(back, full, atol=0.05, rtol=0)
    assert receipt.tokens == {f"router:{layer}": 3 * w.IDS.numel() for layer in w.LAYERS}


# The language model inside a vision-language model ----------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_a_vision_language_model_given_text(name: str) -> None:
    model = every.tiny(name)
    model.generation_config.eos_token_id = None
    layer = next(site.facts.layer for site in find_routers(model) if site.facts.reason is None)
    plan = Steering.from_experts(model, {layer: [w.ON]}, {layer: [w.OFF]})
    before = w.logits(model)
    for outer in (model, model.model.language_model):
        with plan.apply(outer, match="architecture") as receipt, every.watching(model) as seen:
            steered = w.logits(model)
        assert (seen[layer] == w.ON).any(-1).all()
        assert not (seen[layer] == w.OFF).any()
        assert receipt.tokens == {f"router:{layer}": w.IDS.numel()}
        assert not torch.equal(steered, before)
    with plan.apply(model) as receipt:
        assert w.written(model).shape[1] == w.IDS.shape[1] + 4
    assert receipt.tokens == {f"router:{layer}": w.IDS.numel() + 3 * len(w.IDS)}
    assert torch.equal(w.logits(model), before)
    with plan.apply(model):
        counted = w.counts(model)
    row = counted.layers.index(layer)
    assert (counted.rates[:, row, w.ON] == 1).all()
    assert (counted.rates[:, row, w.OFF] == 0).all()
