"""The start-up canary: an engine whose graph lacks the operations does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import WIDTH, closing, open_engine, save_plans, save_tiny
from torch import nn

from steersman import Steering
from steersman.errors import SteeringNotApplied
from steersman.vllm import canary, sites


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("canary")
    model = save_tiny("olmoe", folder / "model")
    plan = Steering.from_experts(model, activate={1: [3]}) + Steering.from_vectors(
        model, {0: torch.ones(WIDTH)}
    )
    return folder / "model", {"steerings": save_plans({"both": plan}, folder / "plans")}


def nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("operation", "site"), [("_edit_scores", "router:1"), ("_edit_states", "block_output:0")]
)
def test_without_the_operation_it_does_not_start(
    served: tuple[Path, dict[str, Any]], operation: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, operation, nothing)
    with pytest.raises(SteeringNotApplied, match=f"planned but not run.*{site}"):
        open_engine(served[0], "olmoe", served[1])


def test_an_operation_that_does_nothing(
    served: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and changes nothing: the sentinel does not move the states."""
    from steersman.vllm.step import Step

    monkeypatch.setattr(Step, "edit_scores", lambda *args: None)
    monkeypatch.setattr(Step, "edit_states", lambda *args: None)
    with pytest.raises(SteeringNotApplied, match="the sentinel plan changed nothing"):
        open_engine(served[0], "olmoe", served[1])


@pytest.mark.long
def test_a_compiled_graph_without_the_operation(
    served: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine runs is the graph, and it is the graph that is looked at."""
    monkeypatch.setattr(sites, "_edit_states", nothing)
    with pytest.raises(SteeringNotApplied, match="planned but not run"):
        open_engine(served[0], "olmoe", served[1], enforce_eager=False)


def test_an_engine_without_plans_has_no_operations(served: tuple[Path, dict[str, Any]]) -> None:
    with closing(open_engine(served[0], "olmoe", None)) as engine:
        runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert not any("steersman_site" in dict(module.named_buffers()) for module in runner.model.modules())


@pytest.mark.parametrize(
    ("again", "steered", "after", "error"),
    [
        (0.0, 1.0, 0.0, None),
        (0.0, 0.0, 0.0, "changed nothing"),
        (0.01, 0.05, 0.0, "changed nothing"),
        (0.01, 5.0, 0.02, None),
        (0.0, 1.0, 0.5, "after the sentinel"),
    ],
)
def test_noise_of_the_engine(again: float, steered: float, after: float, error: str | None) -> None:
    base = torch.zeros(2, 3)
    states = (base, base + again, [base, base + steered], base + after)
    if error is None:
        canary._check(*states)
        return
    with pytest.raises(SteeringNotApplied, match=error):
        canary._check(*states)
