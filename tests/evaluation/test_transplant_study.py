"""Studies of transplantation: the rule that chooses a dose, controls of the same length, their pictures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import families as f
from steersman import PlanError, Steering
from steersman.evaluation.figures import RateRow
from steersman.evaluation.statistics import random_control, rate
from steersman.evaluation.transplant_figures import arms_and_draws, sweep
from steersman.evaluation.transplant_study import SweepPoint, choose_dose
from steersman.evaluation.vector_controls import DrawnControl, unmapped_vector, with_vector


def point(dose: float, positive: int, right: int, refused: int) -> SweepPoint:
    """One dose, in items of a hundred."""
    shares = (rate([True] * n + [False] * (100 - n)) for n in (positive, right, refused))
    return SweepPoint(dose, *shares)


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        # The largest effect among those that keep ordinary answers; the smaller dose on a tie.
        ([point(0.1, 10, 100, 0), point(0.2, 90, 97, 1), point(0.3, 90, 96, 1), point(0.4, 99, 90, 1)], 0.2),
        # Refusing ordinary requests counts as harm even where the rest is right.
        ([point(0.1, 10, 100, 0), point(0.2, 90, 96, 4)], 0.1),
        # None keeps them: the one that keeps most, whatever its effect.
        ([point(0.1, 0, 80, 0), point(0.2, 99, 70, 0)], 0.1),
    ],
)
def test_the_rule_that_chooses_a_dose(points: list[SweepPoint], chosen: float) -> None:
    choice = choose_dose(points)
    assert choice.dose == chosen
    assert choice.to_json()["sweep"][0]["dose"] == 0.1
    assert "95%" in choice.rule
    assert "3%" in choice.rule


def test_a_control_is_as_long_as_the_plan_and_at_its_place() -> None:
    model = f.tiny("olmoe")
    vector = torch.arange(1.0, 33.0)
    plan = Steering.from_vectors(model, {1: vector}, strength=-0.5, scope="prompt")
    other = with_vector(plan, torch.ones(32, dtype=torch.float64), "control")
    (edit,) = other.edits
    assert float(edit.vectors[1].norm()) == pytest.approx(0.5 * float(vector.norm()), rel=1e-6)
    assert (edit.strength, edit.scope, edit.layers) == (1.0, "prompt", (1,))
    assert other.provenance == {"made": "control"}
    assert other.fingerprint != plan.fingerprint
    (same,) = with_vector(plan, torch.ones(32), "control", as_long=False).edits
    assert (same.strength, float(same.vectors[1].norm())) == (-0.5, pytest.approx(32**0.5))
    for wrong in (
        Steering.from_experts(model, {1: [3]}),
        plan + plan,
        Steering.from_vectors(model, {0: vector, 1: vector}),
    ):
        with pytest.raises(PlanError, match="one vector at one layer"):
            with_vector(wrong, vector, "control")


@pytest.mark.parametrize("width", [2, 3, 5])
def test_an_unmapped_vector_is_cut_off_or_filled_up(width: int) -> None:
    bridge = SimpleNamespace(
        of_concept=lambda concept: bridge,
        layer_map=lambda layer: SimpleNamespace(source_layer=7),
        architecture=SimpleNamespace(hidden_size=width),
    )
    concept = SimpleNamespace(vectors={7: torch.tensor([1.0, 2.0, 3.0])})
    found = unmapped_vector(bridge, concept, 0)  # type: ignore[arg-type]
    assert found.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0][:width]


def test_pictures_are_pngs_of_both_themes() -> None:
    choice = choose_dose([point(0.1, 10, 100, 0), point(0.2, 90, 97, 1)])
    drawn = DrawnControl("random", random_control(0.9, np.linspace(0, 0.2, 20)), 50, 0.98, 0.0, 25)
    rows = [RateRow("unsteered", rate([False] * 50)), RateRow("steered", rate([True] * 50), "positive")]
    pictures = {
        theme: (
            sweep(choice, ("refused", "right", "refused too"), theme=theme),
            arms_and_draws(rows, [("random", drawn)], theme=theme),
        )
        for theme in ("light", "dark")
    }
    for both in pictures.values():
        assert all(picture.startswith(b"\x89PNG") for picture in both)
    assert pictures["light"] != pictures["dark"]
