"""Real items of published data sets on a tiny random checkpoint, unsteered and steered."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cli.command_line import save_tiny
from steersman import Steering, load_model
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks import load_task

DATA = Path(os.environ.get("STEERSMAN_DATA", "/nowhere"))
PLACES = {
    "xstest": ("xstest_prompts.csv", 250, 10),
    "xstest-unsafe": ("xstest_prompts.csv", 200, 8),
    "truthfulqa": ("TruthfulQA.csv", 817, 38),
    "squad": ("xquad.en.json", 1190, 1),
    "squad-closed": ("xquad.en.json", 1190, 1),
    "emotions": ("emotions", 1250, 6),
    "text": ("wikitext2_valid.txt", 794, 1),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model, tokenizer = load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"))))
    return Subject(model, tokenizer, batch_size=4, max_new_tokens=4)


@pytest.mark.parametrize("form", PLACES)
def test_a_real_file_is_read_and_measured(form: str, tiny: Subject) -> None:
    place, count, kinds = PLACES[form]
    if not (DATA / place).exists():
        pytest.skip(f"STEERSMAN_DATA names no folder with {place}")
    task = load_task(f"{form}:{DATA / place}")
    assert (len(task), len({item.kind for item in task})) == (count, kinds)
    items = task[:3]
    plan = Steering.from_experts(tiny.model, deactivate={1: [0, 1]}, scope="answer")
    for arm in (Arm("base", None), Arm("steered", plan)):
        condition = Condition(tiny, arm)
        measure = items.measure
        if isinstance(measure, Answers):
            measure = replace(measure, max_new_tokens=4)
        measured = measure.run(condition, items)
        assert len(measured) == 3
        names = {metric.name for metric in items.measure.metrics} - {"positive", "kl"}
        assert all(names <= set(one.scores) for one in measured)
        assert all(math.isfinite(value) for one in measured for value in one.scores.values())
        assert all((one.outcome is not None) == items.measure.sides for one in measured)
        assert bool(condition.receipt) == (arm.steering is not None)
