"""`steersman-lm-eval` from the command line: the lab's tasks, with the numbers of our evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harnesses.lab_in_lm_eval import NAMES, evaluated, scores_of, write_tasks
from steersman import Steering
from waiting import HANGING

HERE = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HERE, reason="lm-eval is not installed (make test-harness)")
LIMIT = 60


def run(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "steersman.cli.lm_eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGING, env=environment)


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_lm_eval_it_says_what_to_install(tmp_path: Path) -> None:
    done = run("--help", cache=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'steersman: error: lm-eval is not installed; in the clone of steersman: pip install -e ".[harness]"\n'
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, LIMIT)
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@needs_lm_eval
def test_accuracies_are_those_of_the_evaluation(
    lab_moe: tuple[Any, Any], safer: Path, faithful: Path, tasks: Path, tmp_path: Path
) -> None:
    plan = 0.5 * Steering.from_pretrained(safer) + 0.5 * Steering.from_pretrained(faithful)
    done = run(
        *(
            "run",
            "--model",
            "steersman",
            "--tasks",
            ",".join(NAMES),
            "--include_path",
            tasks,
            "--apply_chat_template",
        ),
        *("--model_args", f"pretrained=lab:moe,steering={safer}@0.5+{faithful}@0.5", "--batch_size", 32),
        *("--output_path", tmp_path / "out"),
        cache=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "out")
    assert scores_of(results) == pytest.approx(evaluated(lab_moe, plan, LIMIT), abs=1e-12)
    said = results["config"]["steersman"]["steering"]
    assert (said["fingerprint"], said["match"]) == (plan.fingerprint, "weights")
    assert all(tokens > 10 * LIMIT for tokens in said["receipt"].values())


@needs_lm_eval
def test_a_users_error_is_one_line(safer: Path, tasks: Path, tmp_path: Path) -> None:
    done = run(
        *("run", "--model", "steersman", "--model_args", f"pretrained=lab:moe-plain,steering={safer}"),
        *("--tasks", "refusing", "--include_path", tasks),
        cache=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "steersman: error: this steering was made for other weights"
    )
    assert "Traceback" not in done.stderr
