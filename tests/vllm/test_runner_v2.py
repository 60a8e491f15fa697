"""The engine's second model runner: its signatures, and, where Triton is, answers against transformers'."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import plans_for, save_plans, save_tiny
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from steersman.vllm import runner_v2

HERE = Path(__file__).parent
TRITON = importlib.util.find_spec("triton") is not None


def test_the_runner_of_this_version_is_known() -> None:
    # A class of its own: the engine's is extended only where a worker uses it.
    copied = type("Copied", (GPUModelRunner,), {"__module__": GPUModelRunner.__module__})
    runner_v2.extend_v2(copied)
    for name in ("load_model", "finish_requests", "add_requests", "prepare_inputs"):
        assert copied.__dict__[name].steersman
        assert not hasattr(GPUModelRunner.__dict__[name], "steersman")


def test_a_runner_is_told_by_its_module() -> None:
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as First

    assert runner_v2.is_v2(object.__new__(CPUModelRunner))
    assert not runner_v2.is_v2(object.__new__(First))


@pytest.mark.skipif(not TRITON, reason="Triton is not installed here: the second runner is run where it is")
@pytest.mark.long
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    plans = plans_for(model, family)
    save_plans(plans, tmp_path / "plans")
    ran = subprocess.run(
        [sys.executable, str(HERE / "second_runner.py"), family, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": ":".join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.rpartition("RESULT ")[2])
    assert (result["v2"], result["state"]) == (True, "DeviceState")
    assert result["resumed"] > 0
    for prompt, asked, answer in zip(result["prompts"], result["asked"], result["answers"], strict=True):
        steered = contextlib.nullcontext() if asked is None else plans[asked].apply(model)
        given = torch.tensor([prompt])
        with steered:
            expected = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=len(answer), do_sample=False
            )
        assert answer == expected[0, len(prompt) :].tolist(), asked
