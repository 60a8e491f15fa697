"""Models shared by two processes (tensor, expert and data parallel through `DistributedConfig`, gloo on the
processor): the same plan on each of them does what it does on the whole model.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import families as f
import ways as w
from waiting import HANGING

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

WORKER = Path(__file__).parent / "parallel_worker.py"
PROCESSES = 2
WAYS = ("tensor parallel", "expert parallel", "data parallel (FSDP)")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they are started once for all tests."""
    checkpoints, written = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("reports")
    for name in w.WAYS_FAMILIES:
        f.shared(name).save_pretrained(checkpoints / name)
    f.tiny("olmoe", seed=9).save_pretrained(checkpoints / "other")
    together = {
        **os.environ,
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(checkpoints), str(written)],
            env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        output = [process.communicate(timeout=HANGING)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, output, strict=True):
        assert process.returncode == 0, text[-4000:]
    return [json.loads((written / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", w.WAYS_FAMILIES)
def test_the_same_plan_on_each_process(name: str, way: str, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        found = report[f"{name}, {way}"]
        if (name, way) != ("gpt_oss", "tensor parallel"):  # its plan of transformers leaves the experts whole
            assert found.pop("parts") == ["DTensor"]
        assert found.pop("unsteered difference") < 1e-5
        assert found.pop("steered difference") < 1e-5
        assert found.pop("effect") > 1e-2
        found.pop("parts", None)
        assert [what for what, holds in found.items() if holds is not True] == []


def test_weights_in_parts_are_identified_by_their_files(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["refusals"]["other weights"].startswith("WeightsMismatch")
        assert "sharded over processes" in report["refusals"]["no files"]


def test_masked_choices_are_refused_where_transformers_still_masks_them(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        assert "ep_router" in report["hidden choices"]


def test_a_stage_of_a_pipeline_is_another_architecture(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "3 routers" in report["stages"]


def test_an_overflow_of_float16_is_found_in_parts(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["overflow"].startswith("block_output:1: 40000 and what the plan adds to it")
