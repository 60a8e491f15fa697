"""Engines in processes of their own: in tensors, pipelines, with drafts; and a killed worker is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import plans_for, reference, save_plans, save_tiny

from waiting import HANGING

SCRIPT = Path(__file__).parent / "engine_apart.py"
pytestmark = pytest.mark.skipif(
    (os.cpu_count() or 1) < 2, reason="two processes of the engine want two cores"
)


def run(model: Path, plans: dict[str, str], way: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), json.dumps(plans), way],
        capture_output=True,
        text=True,
        timeout=HANGING,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(lines[0].removeprefix("RESULT "))  # type: ignore[no-any-return]


def check(folder: Path, way: str) -> dict[str, Any]:
    model = save_tiny("olmoe", folder / "model")
    plans = plans_for(model, "olmoe")
    result = run(folder / "model", save_plans(plans, folder / "plans"), way)
    assert len(result["answers"]) == 2 * (1 + len(plans))
    for name, prompt, tokens, log_probabilities in result["answers"]:
        expected = reference(model, plans.get(name), prompt, tokens=16)
        assert tokens == expected.tokens, (name, prompt)
        torch.testing.assert_close(
            torch.tensor(log_probabilities), expected.log_probabilities, atol=1e-4, rtol=0
        )
    return result


@pytest.mark.long
def test_tensor_parallel(tmp_path: Path) -> None:
    facts = check(tmp_path, "tensor")["facts"]
    assert [fact["routers"] for fact in facts] == [[1, 2], [1, 2]]


@pytest.mark.long
def test_drafts_are_exact(tmp_path: Path) -> None:
    """By n-grams; apart, since the engine does not start once more where numba has been imported."""
    check(tmp_path, "drafts")


@pytest.mark.long
def test_pipeline_parallel(tmp_path: Path) -> None:
    """Each process edits the layers that it has."""
    facts = check(tmp_path, "pipeline")["facts"]
    assert [fact["routers"] for fact in facts] == [[1], [2]]
    assert [fact["blocks"] for fact in facts] == [[0, 1], [2]]


@pytest.mark.long
def test_a_killed_worker(tmp_path: Path) -> None:
    """The front end says so at once, and no process stays behind."""
    result = check(tmp_path, "kill")
    assert result["workers"] >= 2
    assert result["error"] == "EngineDeadError"
    assert result["alive"] == []
