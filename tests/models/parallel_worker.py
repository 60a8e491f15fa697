"""One process of several that run a model together: loads each way of sharing it, steers, counts, reports.

    RANK=… WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python parallel_worker.py CHECKPOINTS REPORTS

CHECKPOINTS is a folder with a checkpoint for each family; each process writes what it found to
REPORTS/RANK.json.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import families as f
import ways as w
from steersman import (
    ArchitectureMismatch,
    ModelError,
    Steering,
    SteeringNotApplied,
    WeightsMismatch,
    weights_id,
)
from steersman.models.architecture import read_architecture
from waiting import HANGING

WAYS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp_size": 2},
    "expert parallel": {"tp_size": 2, "ep_size": 2},
    "data parallel (FSDP)": {"fsdp_size": 2},
}


def opened(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.generation_config.eos_token_id = None
    return model


def findings(plain: Any, model: Any) -> dict[str, Any]:
    """What one process sees of a shared model, beside the whole one."""
    plan = w.plan_of(plain)
    before, expected = w.logits(model), w.steered(plain, plan)
    found: dict[str, Any] = {
        "architecture": read_architecture(model).id == plan.architecture_id,
        "weights": weights_id(model) == plan.weights_id,
        "parts": sorted({type(p).__name__ for p in f.block_of(model, 1).experts.parameters()}),
        "unsteered difference": float((before - w.logits(plain)).abs().max()),
        "effect": float((expected - w.logits(plain)).abs().max()),
    }
    steered = w.steered(model, plan)  # the promise, at the experts, and the receipt
    found["steered difference"] = float((steered - expected).abs().max())
    found["made on the parts"] = torch.equal(w.steered(model, w.plan_of(model)), steered)
    found["restored"] = torch.equal(w.logits(model), before)
    with plan.apply(model), plan.apply(plain):
        found["written"] = torch.equal(w.written(model), w.written(plain))
    with plan.apply(model):
        counted = w.counts(model)
    with plan.apply(plain):
        found["counts"] = bool((counted.activations == w.counts(plain).activations).all())
    w.check_vectors(plain, model)
    found["unsteered counts"] = bool((w.counts(model).activations == w.counts(plain).activations).all())
    return found


def refusals(folder: Path, other: Path) -> dict[str, str]:
    """Other weights in parts, and weights in parts without files."""
    plan = w.plan_of(opened(folder))
    sharing = DistributedConfig(tp_size=2)
    seen: dict[str, str] = {}
    for name, path in (("other weights", other), ("no files", folder)):
        model = opened(path, distributed_config=sharing)
        if name == "no files":
            model.config.name_or_path = ""
        try:
            with plan.apply(model):
                seen[name] = "applied"
        except (WeightsMismatch, ModelError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


def overflow(folder: Path) -> str:
    """Vectors of 40 000 at two layers of a model in float16, in parts."""
    plan = Steering.from_vectors(
        opened(folder), {layer: torch.full((32,), 4e4) for layer in (0, 1)}, scope="all"
    )
    model = opened(folder, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float16)
    try:
        with plan.apply(model):
            w.logits(model)
            return "applied"
    except SteeringNotApplied as error:
        return str(error)


def hidden_choices(folder: Path) -> str:
    """Expert parallelism by masked routers, where transformers still has it: refused, not miscounted."""
    sharing = DistributedConfig(
        tp_size=2,
        ep_size=2,
        ep_plan={"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"},
    )
    try:
        model = opened(folder, distributed_config=sharing)
    except ValueError as error:
        return f"transformers: {error}"
    try:
        w.counts(model)
    except ModelError as error:
        return str(error)
    return "counted"


def stages(folder: Path) -> str:
    """Pipeline parallelism: this process has the layers of its stage only."""
    plan = w.plan_of(opened(folder))
    try:
        with plan.apply(
            opened(folder, distributed_config=DistributedConfig(pp_size=2)), match="architecture"
        ):
            return "applied"
    except ArchitectureMismatch as error:
        return str(error)


def main(checkpoints: Path, reports: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGING))
    report: dict[str, Any] = {}
    for name in w.WAYS_FAMILIES:
        plain = opened(checkpoints / name)
        for way, sizes in WAYS.items():
            model = opened(checkpoints / name, distributed_config=DistributedConfig(**sizes))
            report[f"{name}, {way}"] = findings(plain, model)
    report["refusals"] = refusals(checkpoints / "olmoe", checkpoints / "other")
    report["hidden choices"] = hidden_choices(checkpoints / "olmoe")
    report["overflow"] = overflow(checkpoints / "olmoe")
    report["stages"] = stages(checkpoints / "olmoe")
    (reports / f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
