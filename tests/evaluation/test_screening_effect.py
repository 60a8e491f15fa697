"""Screening on the lab, three training seeds: experts chosen on train move behaviours on test, both ways, and
harm nothing else; where nothing acts, nothing is found, and that is said.

The figures are written to the file that STEERSMAN_SCREEN_FIGURES names, if it names one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from steersman import PlanError, lab
from steersman.evaluation.arms import Subject
from steersman.evaluation.comparison import REVERSED, TOWARD
from steersman.evaluation.screening_study import (
    FAITHFULNESS,
    OBSERVED,
    OBSERVED_REVERSED,
    REFUSAL,
    Question,
    ScreeningStudy,
    in_markdown,
    run_screening_study,
)

pytestmark = pytest.mark.long

SEEDS = (0, 1, 2)
# What must be reached on test items, in points of the rate: toward at least, reversed at most.
REACHED = {"faithfulness": (0.12, -0.20), "conflicts": (0.25, -0.30), "refusal": (0.25, -0.40)}
OTHER = {"faithfulness": "refusal", "refusal": "faithfulness"}


def studied(model: str, seed: int, question: Question) -> ScreeningStudy:
    opened, tokenizer = lab.load(model, seed=seed, progress=True)
    subject = Subject(opened, tokenizer, batch_size=150, max_new_tokens=12)
    name = f"lab:{model}" + (f"@{seed}" if seed else "")
    return run_screening_study(subject, question, model=name, draws=199, items=300, advance=print)


@pytest.fixture(scope="module")
def studies() -> dict[tuple[int, str], ScreeningStudy]:
    found = {
        (seed, question.task): studied("moe", seed, question)
        for seed in SEEDS
        for question in (FAITHFULNESS, REFUSAL)
    }
    print(in_markdown(list(found.values())))
    if path := os.environ.get("STEERSMAN_SCREEN_FIGURES"):
        figures = [study.to_json() for study in found.values()]
        Path(path).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return found


EACH = pytest.mark.parametrize("seed", SEEDS)
BEHAVIOUR = pytest.mark.parametrize("behaviour", ["faithfulness", "refusal"])


@EACH
@pytest.mark.parametrize(
    ("behaviour", "task"),
    [("faithfulness", "faithfulness"), ("faithfulness", "conflicts"), ("refusal", "refusal")],
)
def test_screened_experts_move_behaviour_both_ways(
    studies: dict[tuple[int, str], ScreeningStudy], seed: int, behaviour: str, task: str
) -> None:
    study = studies[seed, behaviour]
    toward, back = study.difference(task, TOWARD), study.difference(task, REVERSED)
    assert toward.count >= 300
    least, most = REACHED[task]
    assert toward.difference >= least
    assert back.difference <= most
    assert toward.low > 0 > back.high


@EACH
@BEHAVIOUR
def test_with_few_experts_and_better_than_random_ones(
    studies: dict[tuple[int, str], ScreeningStudy], seed: int, behaviour: str
) -> None:
    study = studies[seed, behaviour]
    assert all(1 <= len(chosen.picks) <= 8 for chosen in study.screen.sets.values())
    assert study.control is not None
    assert len(study.control.draws) == 199
    assert study.control.p <= 0.01


@EACH
@BEHAVIOUR
def test_nothing_else_is_harmed(
    studies: dict[tuple[int, str], ScreeningStudy], seed: int, behaviour: str
) -> None:
    study = studies[seed, behaviour]
    for arm in (TOWARD, REVERSED):
        for task in ("closed-book", "ordinary"):
            assert study.comparisons[task].rate(arm) >= 0.97
        assert abs(study.difference(OTHER[behaviour], arm).difference) <= 0.05


@EACH
@BEHAVIOUR
def test_the_risk_difference_stands_beside(
    studies: dict[tuple[int, str], ScreeningStudy], seed: int, behaviour: str
) -> None:
    study = studies[seed, behaviour]
    assert study.choice is not None
    for arm in (OBSERVED, OBSERVED_REVERSED):
        assert study.difference(behaviour, arm).count >= 300
    assert study.screen.agreement() is not None
    assert "observational_rank" in study.screen.table()


@pytest.mark.parametrize("model", ["moe-prior", "moe-plain"])
def test_where_nothing_acts_nothing_is_found_and_that_is_said(model: str) -> None:
    study = studied(model, 0, FAITHFULNESS)
    assert not study.screen.found
    assert "no effect of 128 experts passes the gate" in study.screen.reason
    assert study.to_json()["found"] is False
    with pytest.raises(PlanError, match="found nothing to steer"):
        study.screen.select()
