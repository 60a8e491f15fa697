"""The promise at the engine: an expert at 1 is chosen for every token, one at −1 for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import FAMILIES, ask, closing, open_engine, params, prompts, save_plans, save_tiny
from safetensors.torch import load_file, save_file

from families import GROUPED
from steersman import Steering

MOE = [name for name in FAMILIES if name != "llama"]


def scale_gates(folder: Path, factor: float) -> None:
    """Multiply the routers' weights of a checkpoint: softmax and sigmoid run out of range then."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith((".gate.weight", ".router.weight")):
            tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("factor", [pytest.param(1.0, marks=pytest.mark.long), 200.0])
@pytest.mark.parametrize(
    "name", [n if n in ("olmoe", *GROUPED) else pytest.param(n, marks=pytest.mark.long) for n in MOE]
)
def test_the_promise(name: str, factor: float, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "model")
    scale_gates(tmp_path / "model", factor)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    layers = [1, 2]
    plan = Steering.from_experts(model, activate={1: [1], 2: [6, 7]}, deactivate={1: [0, 4], 2: [0]})
    settings = {"steerings": save_plans({"plan": plan}, tmp_path / "plans")}
    with closing(open_engine(tmp_path / "model", name, settings)) as engine:
        runner: Any = (
            engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        )
        seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for module in runner.model.modules():
            if hasattr(module, "router") and hasattr(module, "layer_id") and module.layer_id in layers:
                module.router.set_capture_fn(lambda ids, at=seen[module.layer_id]: at.append(ids.clone()))
        ask(engine, prompts(4), [params("plan")] * 4)
    for layer in layers:
        chosen = torch.cat(seen[layer])
        assert len(chosen) >= 4 * (20 + 7)
        for expert, strength in plan.strengths[layer].items():
            share = (chosen == expert).any(dim=-1).float().mean().item()
            assert share == (1.0 if strength > 0 else 0.0), (layer, expert)
