"""`steersman compose`: one plan of several, of either lever."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families as f
from cli.command_line import run
from steersman import Steering, compose, load_model


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Path]:
    model = f.tiny("olmoe")
    found = {
        "in": Steering.from_experts(model, {1: [5]}),
        "out": Steering.from_experts(model, deactivate={1: [5]}),
        "vector": Steering.from_vectors(model, {2: torch.arange(1.0, 33.0)}, strength=2.0),
        "projected": Steering.from_vectors(model, {0: torch.ones(32)}, operation="project"),
        "other": Steering.from_experts(f.tiny("mixtral"), {1: [5]}),
    }
    for name, plan in found.items():
        plan.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in found}


def test_experts_and_vectors_in_one_plan(plans: dict[str, Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    result = run("compose", plans["in"], f"{plans['vector']}@0.5", "-o", both, "--json").json
    saved = Steering.from_pretrained(both)
    parts = [Steering.from_pretrained(plans[name]) for name in ("in", "vector")]
    assert saved.edits == compose(parts[0], 0.5 * parts[1]).edits
    assert saved.fingerprint == (parts[0] + 0.5 * parts[1]).fingerprint == result["fingerprint"]
    assert result["activated"] == [{"layer": 1, "expert": 5, "strength": 1.0}]
    (vector,) = result["vectors"]
    assert (vector["layer"], vector["operation"], vector["scope"], vector["strength"]) == (
        2,
        "add",
        "answer",
        1,
    )
    assert vector["norm"] == pytest.approx(float(torch.arange(1.0, 33.0).norm()))
    words = run("compose", plans["projected"], both, "-o", tmp_path / "all").words
    for said in ("activated 1: 1:5", "layer 0: project × ", "layer 2: add × 1, scope answer"):
        assert said in words
    shown = run("show", tmp_path / "all").words
    assert "1 expert activated, 0 deactivated, vectors at layers 0, 2" in shown
    assert "project" in shown
    assert "residual stream" in shown
    assert [v["layer"] for v in run("show", tmp_path / "all", "--json").json["vectors"]] == [0, 2]


def test_what_a_plan_is_made_of_is_named(
    plans: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the folders' names, not by where they lie; and as deep as they were saved."""
    half, both = tmp_path / "half", tmp_path / "both"
    known = {name: Steering.from_pretrained(place).fingerprint for name, place in plans.items()}
    assert (
        f"scaled, from in ({known['in'][:16]}…) × 0.5"
        in run("compose", f"{plans['in']}@0.5", "-o", half).words
    )
    known["half"] = Steering.from_pretrained(half).fingerprint
    made = run("compose", half, f"{plans['vector']}@-2", "-o", both, "--json").json
    shown = run("show", both, "--json").json
    assert made["sources"] == shown["sources"]
    assert [(one["name"], one["strength"], one["fingerprint"]) for one in shown["sources"]] == [
        ("half", 1.0, known["half"]),
        ("vector", -2.0, known["vector"]),
    ]
    of = f"composed, from half ({known['half'][:16]}…), vector ({known['vector'][:16]}…) × -2"
    assert of in run("show", both).words
    assert str(tmp_path) not in json.dumps(Steering.from_pretrained(both).provenance)
    # In Python nobody says the names: what they were is known by their fingerprints.
    (0.5 * -Steering.from_pretrained(plans["vector"])).save_pretrained(tmp_path / "python")
    assert f"scaled, from a plan ({known['vector'][:16]}…) × -0.5" in run("show", tmp_path / "python").words
    (tmp_path / "link").symlink_to(plans["in"])
    monkeypatch.chdir(plans["vector"])
    for typed, name in (("../link", "link"), (".", "vector"), ("../in/", "in")):
        made = run("compose", f"{typed}@0.5", "-o", tmp_path / "named", "--force", "--json").json
        assert [one["name"] for one in made["sources"]] == [name]
    narrow = run("compose", plans["in"], "-o", tmp_path / "narrow", "--scope", "answer").words
    assert "(layer:expert, scope answer)" in narrow
    assert "its chats had" not in narrow  # made by hand
    assert f"rescoped, from in ({known['in'][:16]}…)" in narrow
    assert (
        f"steersman: error: {half}@3: scaled by 3" in run("compose", f"{half}@3", "-o", tmp_path / "x").stderr
    )


@pytest.mark.parametrize(
    "words",
    [
        {"made": "scaled", "by": "another tool"},
        {"made": "composed", "from": ["a", 5]},
        {"skipped": ["a"], "doses": [1]},
        {"made": "scaled", "factor": "half", "from": []},
    ],
)
def test_a_plan_of_another_tool_may_say_of_itself_what_it_likes(
    words: dict[str, Any], plans: dict[str, Path], tmp_path: Path
) -> None:
    foreign = replace(Steering.from_pretrained(plans["vector"]), provenance=words)
    foreign.save_pretrained(tmp_path / "foreign")
    done = run("compose", f"{tmp_path / 'foreign'}@0.5", "-o", tmp_path / "half")
    assert done.words.startswith(f"{tmp_path / 'half'}: steering ")
    assert "layer 2: add × 1, scope answer" in done.words


def test_a_scope_for_all_edits(plans: dict[str, Path], tmp_path: Path) -> None:
    run("compose", plans["in"], plans["vector"], "-o", tmp_path / "both", "--scope", "prompt")
    saved = Steering.from_pretrained(tmp_path / "both")
    assert [edit.scope for edit in saved.edits] == ["prompt", "prompt"]
    parts = [Steering.from_pretrained(plans[name]).with_scope("prompt") for name in ("in", "vector")]
    assert saved.fingerprint == compose(*parts).fingerprint


def test_what_differs_by_scope_alone_contradicts_itself_in_one(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    run("compose", plans["in"], "-o", tmp_path / "early", "--scope", "prompt")
    run("compose", plans["out"], "-o", tmp_path / "late", "--scope", "generated")
    both = [tmp_path / "early", tmp_path / "late", "-o", tmp_path / "both"]
    error = run("compose", *both, "--scope", "all").error
    assert "early" in error
    assert "--on-conflict sum" in error
    assert not (tmp_path / "both").exists()
    assert len(Steering.from_pretrained(both[0]).edits + Steering.from_pretrained(both[1]).edits) == 2
    assert run("compose", *both).status == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("in", "out"), r"layer 1, expert 5: .*--on-conflict sum"),
        (("in", "other"), "different architectures"),
        (("projected@-1",), "project has strength -1: it must lie between 0 and 1"),
        (("projected@2",), "project has strength 2"),
        (("in", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_composed(
    plans: dict[str, Path], tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    given = [str(tmp_path / name) for name in names]
    assert re.search(message, run("compose", *given, "-o", tmp_path / "out-of-it").error)
    assert not (tmp_path / "out-of-it").exists()


def test_conflicts_are_summed_where_asked(plans: dict[str, Path], tmp_path: Path) -> None:
    given = (plans["in"], plans["out"], "-o", tmp_path / "sum", "--on-conflict", "sum", "--json")
    assert run("compose", *given).json["activated"] == []
    assert Steering.from_pretrained(tmp_path / "sum").strengths == {1: {5: 0.0}}


def test_generate_says_what_each_lever_changed(tmp_path: Path) -> None:
    model, _ = load_model("lab:target-moe")
    both = Steering.from_experts(model, {1: [3]}) + Steering.from_vectors(model, {2: torch.ones(96)})
    both.save_pretrained(tmp_path / "both")
    words = run(
        "generate",
        "lab:target-moe",
        "--steering",
        tmp_path / "both",
        "--prompt",
        "tell me the height of the mill .",
    ).words
    found = re.search(
        r"routing changed at (\d+) of (\d+) places, states changed at (\d+) of (\d+) places", words
    )
    assert found
    routed, of_routed, moved, of_moved = map(int, found.groups())
    assert 0 < routed <= of_routed
    assert 0 < moved == of_moved < of_routed
