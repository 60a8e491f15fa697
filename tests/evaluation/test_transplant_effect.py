"""What the project claims of transplantation, measured again: three training seeds, held-out items, controls.

Seeds other than 0 are trained the first time: minutes each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from steersman.certainty import SHOWN
from steersman.concepts.fitting import fit_affine_map
from steersman.concepts.refinement import refine_concept
from steersman.concepts.transplant_check import TransplantCheck, check_transplant, rank
from steersman.evaluation.lab_study import Laboratory, Passage, Plot
from steersman.evaluation.levers_study import BOTH, EXPERTS, VECTOR
from steersman.evaluation.tasks import load_task
from steersman.evaluation.transplant_report import levers_findings
from steersman.evaluation.transplant_study import TRANSPLANTED, UNMAPPED, TransplantStudy, measured_effect
from steersman.pairs import load_pairs
from steersman.texts import load_texts

SEEDS = (0, 1, 2)
CONCEPTS = ("restricted", "unknown", "believed", "job", "request", "noise")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def rooms() -> dict[int, Laboratory]:
    return {seed: Laboratory(items=300, draws=49, model_seed=seed, progress=True) for seed in SEEDS}


def kept(name: str, content: object) -> None:
    """Write figures down where somebody wants them."""
    if folder := os.environ.get("STEERSMAN_FIGURES"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(content, indent=1))


def study(room: Laboratory, source: str, target: str) -> TransplantStudy:
    found = room.transplant(Passage(source, target, "restricted"), lambda *_: None)
    kept(f"{source}-{target}-{room.model_seed}", found.to_json())
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_the_small_models_refusals_arrive_in_the_bigger_one(rooms: dict[int, Laboratory], seed: int) -> None:
    found = study(rooms[seed], "source", "target")
    cost = found.cost.arms[TRANSPLANTED].rates
    assert found.effect.rate(TRANSPLANTED) >= 0.90
    assert cost["positive"].rate >= 0.90
    assert cost["negative"].rate <= 0.05
    assert found.effect.rate(UNMAPPED) <= 0.10
    for drawn in found.controls:
        assert drawn.control.mean <= 0.10
        # Stretched, what differs between matched pairs is the concept itself now and then.
        assert drawn.control.p <= (0.05 if drawn.name == "shuffled, as long" else 0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_another_tokenizer_at_the_source(rooms: dict[int, Laboratory], seed: int) -> None:
    found = study(rooms[seed], "source-split", "target")
    cost = found.cost.arms[TRANSPLANTED].rates
    assert found.effect.differences[TRANSPLANTED].difference >= 0.40
    assert cost["positive"].rate >= 0.90
    assert cost["negative"].rate <= 0.05


def test_both_levers_in_one_plan_move_what_each_is_meant_to_move(rooms: dict[int, Laboratory]) -> None:
    found = rooms[0].levers(
        Plot("target-moe", "faithfulness", ()),
        Passage("source", "target-moe", "restricted"),
        300,
        lambda *_: None,
    )
    kept("levers-0", found.to_json())
    experts, vector = (found.comparisons[name] for name in (found.of_experts, found.of_vector))
    for arm in (EXPERTS, BOTH):
        assert experts.differences[arm].high < 0
    assert [finding.verdict for finding in levers_findings(found)[:2]] == [SHOWN, SHOWN]
    assert experts.rate(BOTH) < experts.rate(VECTOR)
    for arm in (VECTOR, BOTH):
        assert vector.differences[arm].low > 0
    layers = {edit.point: set(edit.layers) for edit in found.plan.edits}
    sites = {f"{point}:{layer}" for point, named in layers.items() for layer in named}
    assert set(found.receipt["tokens"]) == sites
    assert all(found.receipt["tokens"].values())


def test_the_check_knows_beforehand_what_carries_over(rooms: dict[int, Laboratory]) -> None:
    checks: dict[str, TransplantCheck] = {}
    effects: dict[str, float] = {}
    for seed, room in rooms.items():
        source, target = room.subject("source"), room.subject("target")
        opened = (target.model, target.tokenizer)
        for name in CONCEPTS:
            concept = refine_concept(source.model, source.tokenizer, f"lab:{name}/train", batch_size=64)
            bridge = fit_affine_map(
                (source.model, source.tokenizer),
                opened,
                load_texts("lab:texts"),
                concept=concept,
                batch_size=64,
            )
            key = f"{name}@{seed}"
            checks[key] = check_transplant(
                bridge, concept, opened, load_pairs(f"lab:{name}/test"), batch_size=64
            )
            task = load_task(f"lab:{name}/test", limit=300)
            effects[key] = measured_effect(target, concept, bridge, checks[key], task)
        of_seed = {key: check for key, check in checks.items() if key.endswith(f"@{seed}")}
        assert rank(of_seed)[-1] == f"noise@{seed}"
        assert not of_seed[f"noise@{seed}"].passed
    order = rank(checks)
    kept("check", {key: {"effect": effects[key], **checks[key].best.to_json()} for key in order})
    found = spearmanr([-place for place in range(len(order))], [effects[key] for key in order])
    assert found.statistic >= 0.7, [(key, round(effects[key], 2)) for key in order]
