"""The lab's tasks in lm-evaluation-harness: as `hf` runs them, and with our evaluation's accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-harness)")

import datasets
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from harnesses.lab_in_lm_eval import NAMES, evaluated, scores_of, write_tasks
from steersman import Steering
from steersman.harnesses import lm_eval  # noqa: F401 registers the model

LIMIT = 80


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskManager]:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, LIMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield TaskManager(include_path=str(folder), include_defaults=False)


def results(manager: TaskManager, model: str, batch_size: int = 32, **arguments: Any) -> dict[str, Any]:
    found: Any = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=NAMES,
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found
    return found


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model gave for every item: texts, and likelihoods to the last bit."""
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


def test_unsteered_results_are_those_of_hf(manager: TaskManager, checkpoint: str, lab_moe: Any) -> None:
    hf = results(manager, "hf", pretrained=checkpoint, dtype="float32")
    own = results(manager, "steersman", pretrained=checkpoint, dtype="float32")
    lab = results(manager, "steersman", pretrained="lab:moe")
    assert hf["results"] == own["results"] == lab["results"]
    assert answers(hf) == answers(own) == answers(lab)
    assert scores_of(hf) == pytest.approx(evaluated(lab_moe, None, LIMIT), abs=1e-12)


@pytest.mark.parametrize("plan", ["safer", "faithful"])
def test_steered_accuracies_are_those_of_the_evaluation(
    manager: TaskManager, lab_moe: Any, plan: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(plan)
    found = results(manager, "steersman", pretrained="lab:moe", steering=f"{folder}")
    expected = evaluated(lab_moe, Steering.from_pretrained(folder), LIMIT)
    assert scores_of(found) == pytest.approx(expected, abs=1e-12)
    assert expected != evaluated(lab_moe, None, LIMIT)
