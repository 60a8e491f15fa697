"""The plan in one argument: strengths, sums, odd names, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import families as f
from steersman import Steering
from steersman.errors import ArchitectureMismatch, ArtifactError, PlanError, WeightsMismatch
from steersman.harnesses.plans import check_fits, open_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plans")
    model = f.shared("olmoe")
    Steering.from_experts(model, activate={1: [4]}).save_pretrained(made / "a")
    Steering.from_vectors(model, {1: [1.0] * f.WIDTH}).save_pretrained(made / "b")
    Steering.from_experts(model, deactivate={2: [5]}).save_pretrained(made / "c+d@2")
    return made


def test_one_plan_is_that_of_its_folder(folder: Path) -> None:
    assert open_plan(f"{folder}/a") == Steering.from_pretrained(folder / "a")
    assert open_plan(None) is None
    plan = Steering.from_pretrained(folder / "b")
    assert open_plan(plan) is plan


def test_strengths_and_sums(folder: Path) -> None:
    a, b = (Steering.from_pretrained(folder / name) for name in "ab")
    assert open_plan(f"{folder}/a@0.5").fingerprint == (0.5 * a).fingerprint
    assert open_plan(f"{folder}/a@-0.5+{folder}/b@2").fingerprint == (-0.5 * a + 2 * b).fingerprint


def test_what_exists_as_it_is_written_is_a_path(folder: Path) -> None:
    plan = Steering.from_pretrained(folder / "c+d@2")
    assert open_plan(f"{folder}/c+d@2").fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    ("wrong", "why"),
    [("{}/a@much", "'much' is no strength"), ("{}/a@nan", "is no strength"), ("@0.5", "names no steering")],
)
def test_what_is_no_plan(folder: Path, wrong: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        open_plan(wrong.format(folder))


def test_a_strength_out_of_range_says_where(folder: Path) -> None:
    with pytest.raises(PlanError, match="scaled by 3"):
        open_plan(f"{folder}/a@3")
    with pytest.raises(ArtifactError, match="no-such-plan"):
        open_plan(f"{folder}/a+{folder}/no-such-plan")


def test_a_plan_for_another_model_is_refused_before_the_first_item(folder: Path) -> None:
    plan: Any = open_plan(f"{folder}/a")
    with pytest.raises(ArchitectureMismatch):
        check_fits(plan, f.shared("mixtral"), "architecture")
    with pytest.raises(WeightsMismatch):
        check_fits(plan, f.tiny("olmoe", seed=1), "weights")
    check_fits(plan, f.tiny("olmoe", seed=1), "architecture")
    with pytest.raises(PlanError, match="match='weight' is unknown"):
        check_fits(None, f.shared("olmoe"), "weight")
