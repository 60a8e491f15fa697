"""Evidence in a plan: of which evaluation, at which strength, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from made_results import made_result

from cli.command_line import run
from steersman import ArtifactError, Steering
from steersman.evaluation.evaluation_report import card_evidence, evidence_in_words, with_evidence
from steersman.experts.contrast import RoutingContrast


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_result()


def test_evidence_is_attached_once_and_changes_nothing_else(
    result: dict[str, Any], contrast: RoutingContrast, tmp_path: Path
) -> None:
    plan, folder = contrast.select(top=4), tmp_path / "plan"
    plan.save_pretrained(folder)
    with pytest.raises(ArtifactError, match="not of this plan"):
        with_evidence(folder, result)
    assert Steering.from_pretrained(folder).evidence == ()
    of_plan = copy.deepcopy(result)
    of_plan["steerings"][0]["fingerprint"] = plan.fingerprint
    for _ in range(2):
        with_evidence(folder, of_plan)
    read = Steering.from_pretrained(folder)
    assert read.fingerprint == plan.fingerprint
    assert read.evidence == (card_evidence(of_plan, "safer"),)
    assert read.provenance == plan.provenance
    effect = next(task for task in read.evidence[0]["tasks"] if task["arm"] == "safer")
    assert effect["difference"] == of_plan["tasks"][0]["differences"]["safer"]["positive"]["difference"]
    assert effect["random_p"] == 0.05
    assert (2 * (0.5 * read)).evidence == ()
    words = run("show", folder).words
    assert "  shown: refusal, safer: refused +" in words
    assert "  cannot tell: ordinary, safer: refused " in words
    assert "p among drawn plans 0.05; 60 items" in words
    assert "reading, safer: perplexity " in words


@pytest.mark.parametrize("random", [None, {"draws": [0.1, 0.2, 0.3], "p": 0.25, "at_least": 0}])
def test_evidence_without_enough_random_plans_shows_nothing(
    result: dict[str, Any], random: dict[str, Any] | None
) -> None:
    changed = copy.deepcopy(result)
    if random is None:
        changed["tasks"][0]["random"] = None
    else:
        changed["tasks"][0]["random"][0] |= random
    said = evidence_in_words([card_evidence(changed, "safer")])
    assert any(line.startswith("  cannot tell: refusal, safer: refused +") for line in said)


def test_evidence_of_a_dialled_plan_says_at_which_strength(
    result: dict[str, Any], contrast: RoutingContrast, tmp_path: Path
) -> None:
    plan = contrast.select(top=4)
    plan.save_pretrained(tmp_path / "plan")
    half = 0.5 * plan
    of_half = copy.deepcopy(result)
    of_half["steerings"][1] |= {"fingerprint": half.fingerprint, "provenance": dict(half.provenance)}
    evidence = with_evidence(tmp_path / "plan", of_half).evidence
    assert Steering.from_pretrained(tmp_path / "plan").evidence == evidence
    assert {(task["arm"], task["strength"]) for task in evidence[0]["tasks"]} == {("a/b~c", 0.5)}
