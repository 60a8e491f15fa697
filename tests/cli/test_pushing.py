"""`steersman push`: what is uploaded, to a server on this machine; what its card says; what is refused."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from cli.command_line import process, run
from hub_server import LocalHub, local_hub
from steersman import (
    ConceptVector,
    RoutingContrast,
    Steering,
    detect_experts,
    load_model,
    load_pairs,
    refine_concept,
)

TASK = {
    "task": "lab:refusal",
    "sha256": "0" * 64,
    "items": 300,
    "metric": "refused",
    "kind": "rate",
    "arm": "safer",
    "arm_kind": "steered",
    "strength": 1.0,
    "difference": 0.41,
    "low": 0.36,
    "high": 0.47,
    "p": 0.0001,
    "p_holm": 0.0001,
    "random_p": 0.02,
}
EVIDENCE = {
    "kind": "evaluation",
    "sha256": "1" * 64,
    "created": "2026-01-02",
    "steersman": "0.1.0",
    "tasks": [{**TASK, "role": "effect"}],
}


def environment(hub: LocalHub, place: Path) -> dict[str, str]:
    """Of a process that takes the server for the Hub."""
    mine = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **mine, "HF_HOME": str(place / "hf")}


def test_pushed_and_used_from_there(steering: Path, tiny: Path, tmp_path: Path) -> None:
    with local_hub() as hub:
        pushed = process(
            "push", steering, "you/safer", "--license", "cc-by-4.0", "--private", "--branch", "trial",
            "--message", "the first", "--json", env=environment(hub, tmp_path),
        ).json  # fmt: skip
        run_there = process(
            "generate", tiny, "--steering", "you/other", "--prompt", "hi", env=environment(hub, tmp_path)
        )
        process("push", steering, "you/other", "--license", "mit", env=environment(hub, tmp_path))
        again = process(
            "generate", tiny, "--steering", "you/other", "--prompt", "hi", "--max-new-tokens", 2, "--json",
            env=environment(hub, tmp_path),
        )  # fmt: skip
    first = hub.commits[0]
    assert (first.repository, first.branch, first.message, first.token) == (
        "you/safer",
        "trial",
        "the first",
        "hf_x",
    )
    assert hub.repositories == {"you/safer": True, "you/other": False}
    assert pushed == {
        "repository": "you/safer",
        "kind": "steering",
        "license": "cc-by-4.0",
        "base_model": [],
        "evaluations": 0,
        "address": f"{hub.address}/you/safer/commit/{first.sha}",
    }
    assert "neither a folder here" in run_there.error
    (item,) = json.loads(again.stdout)["items"]  # its bar of what is fetched is on stderr
    assert item["receipt"]["fingerprint"] == Steering.from_pretrained(steering).fingerprint


def card_of(artifact: Path, place: Path) -> ModelCard:
    run("push", artifact, "you/thing", "--license", "apache-2.0", "-o", place, "--force")
    return ModelCard((place / "README.md").read_text(encoding="utf-8"))


def test_the_card_of_a_plan(steering: Path, contrast: Path, tmp_path: Path) -> None:
    plan = replace(Steering.from_pretrained(steering), model="nobody/moe-1b", revision="abc")
    plan.save_pretrained(tmp_path / "plan")
    card = card_of(tmp_path / "plan", tmp_path / "card")
    assert card.data.to_dict() == {
        "base_model": "nobody/moe-1b",
        "library_name": "steersman",
        "license": "apache-2.0",
        "tags": ["steersman", "steering"],
    }
    assert "**Not evaluated.**" in card.text
    assert "side effects" not in card.text.lower()
    assert f"fingerprint: {plan.fingerprint}" in card.text
    (pairs,) = RoutingContrast.from_pretrained(contrast).made_from
    assert pairs["sha256"] in card.text  # from which pairs
    layer, experts = next(iter(plan.strengths.items()))
    assert f"layer {layer}: " in card.text
    assert all(f"{expert} (λ " in card.text for expert in experts)
    assert 'steersman.Steering.from_pretrained("you/thing")' in card.text
    words = run("push", steering, "you/thing", "--license", "mit", "-o", tmp_path / "look").words
    assert "The card says that it was not evaluated" in words
    assert "The card names no base model" in words
    assert Steering.from_pretrained(tmp_path / "look") == Steering.from_pretrained(steering)


def test_the_card_says_what_was_found_with_intervals(steering: Path, tmp_path: Path) -> None:
    plan = Steering.from_pretrained(steering)
    replace(plan, evidence=(EVIDENCE,)).save_pretrained(tmp_path / "plan")
    text = card_of(tmp_path / "plan", tmp_path / "card").text
    assert "shown: lab:refusal, safer: refused +41 points (95% interval +36 to +47)" in text
    assert "300 items" in text
    assert "no other task was run, so nobody can tell" in text
    assert "Not evaluated" not in text
    side = {**EVIDENCE, "tasks": [*EVIDENCE["tasks"], {**TASK, "role": "side", "task": "lab:ordinary"}]}
    replace(plan, evidence=(side,)).save_pretrained(tmp_path / "both")
    text = card_of(tmp_path / "both", tmp_path / "card").text
    assert "lab:ordinary" in text
    assert "no other task was run" not in text


def test_the_card_of_a_concept_and_of_a_contrast(dense: Path, contrast: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"positive": f"the river is {n}", "negative": f"a town of {n} books"} for n in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("refine", dense, pairs, "-o", tmp_path / "concept").status == 0
    text = card_of(tmp_path / "concept", tmp_path / "card").text
    concept = ConceptVector.from_pretrained(tmp_path / "concept")
    best = max(one.auroc for one in concept.separation.values() if one is not None)
    assert f"AUROC {best:.3f} (95% interval " in text
    assert concept.made_from[0]["sha256"] in text
    assert "does not say that adding the direction steers" in text
    card = card_of(contrast, tmp_path / "card")
    assert card.data.tags == ["steersman", "routing-contrast"]
    assert "wording alone can make them" in card.text
    assert "- contrast pairs: 30" in card.text
    assert not re.search(r"\balike\b|seed|new.tokens|skipped", card.text)  # keys, and what is none
    assert "| layer | expert | risk difference | low |" in card.text


def test_the_example_of_a_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = load_pairs("lab:refusal/dev")[:24]
    concept = refine_concept(*load_model("lab:source"), pairs)
    by_hand = Steering.from_vectors("lab:source", {1: torch.ones(64)}, scope="all")
    detect_experts(*load_model("lab:moe"), pairs).save_pretrained("contrast")
    for artifact, chats in ((concept, True), (concept.steering("1"), True), (by_hand, False)):
        artifact.save_pretrained("artifact", force=True)
        text = card_of(Path("artifact"), Path("you/thing")).text
        (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert ("apply_chat_template" in example) == chats
        found: dict[str, Any] = {}
        exec(example, found)
        assert sum(found["receipt"].tokens.values()) > 0
    (example,) = re.findall(
        r"```python\n(.*?)```", card_of(Path("contrast"), Path("you/thing")).text, re.DOTALL
    )
    exec(example, {})


def test_a_card_names_no_place_on_this_machine(steering: Path, contrast: Path, tmp_path: Path) -> None:
    """Of a local copy it has the name, and the base model where its configuration says it."""
    home = tmp_path / "home" / "me"
    (home / "copy").mkdir(parents=True)
    (home / "pairs.jsonl").write_text("")
    config = home / "copy" / "config.json"
    made = {
        "made": "concept",
        "concept": {"model": str(home / "copy"), "from": [{"name": f"{home}/pairs.jsonl"}]},
    }
    task = {**TASK, "role": "effect", "task": "jsonl:~/tasks/refused.jsonl"}
    plan = replace(
        Steering.from_pretrained(steering),
        model=str(home / "copy"),
        provenance=made,
        evidence=({**EVIDENCE, "tasks": [task]},),
    )
    plan.save_pretrained(tmp_path / "plan")
    for said, base in (
        ({"_name_or_path": "nobody/moe-1b"}, "nobody/moe-1b"),
        ({"_name_or_path": "../moe"}, None),
        ({"_name_or_path": str(home / "copy")}, None),
        ({}, None),
    ):
        config.write_text(json.dumps(said))
        card = card_of(tmp_path / "plan", tmp_path / "card")
        assert card.data.base_model == base
        assert 'load_model("path/to/copy")' in card.text  # it may be tuned from that base
        assert "steersman chat path/to/copy " in card.text
        assert "path/to/copy is the folder of the model named above" in card.text
        assert "- for: copy, " in card.text
        for place in (str(tmp_path), "home", "~", "tasks/"):
            assert place not in card.text
        assert "name: pairs.jsonl" in card.text
        assert "refused.jsonl" in card.text
    config.write_text("{")
    assert card_of(tmp_path / "plan", tmp_path / "card").data.base_model is None
    told = ("push", tmp_path / "plan", "you/x", "--license", "mit", "-o", tmp_path / "card", "--force")
    assert "--base-model OWNER/NAME" in run(*told).words
    assert run(*told, "--base-model", "a/b/c").error == "'a/b/c' is no model on the Hub; right is OWNER/NAME"
    assert run(*told, "--base-model", "nobody/moe", "--json").json["base_model"] == ["nobody/moe"]
    assert ModelCard.load(tmp_path / "card" / "README.md").data.base_model == "nobody/moe"


def test_texts_in_a_card_are_no_places(steering: Path, tmp_path: Path) -> None:
    """Nor is a model without a name the folder that one stands in."""
    told = {"made": "/etc is a folder, ~5 pairs", "note": "you are kind " * 25 + "and/or brave"}
    chat = {"arguments": {"name": "~/me, or who", "who": told["note"]}}
    plan = replace(Steering.from_pretrained(steering), provenance={**told, "chat": chat}, model="")
    plan.save_pretrained(tmp_path / "plan")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "nobody/moe-1b"}))
    with pytest.MonkeyPatch.context() as there:
        there.chdir(tmp_path)
        card = card_of(tmp_path / "plan", tmp_path / "card")
    assert card.data.base_model is None
    assert "nobody" not in card.text
    for text in told.values():
        assert text in card.text.replace("\\", "")
    named = replace(plan, model="a" * 300 + "/b", provenance={"from": [{"name": told["note"]}]})
    named.save_pretrained(tmp_path / "named")
    assert told["note"] in card_of(tmp_path / "named", tmp_path / "card").text


def test_names_in_a_card_are_no_markup(steering: Path, tmp_path: Path) -> None:
    plan = Steering.from_pretrained(steering)
    made = {"made": "<script>x</script>\n# [a](http://b)\u202e"}
    replace(plan, provenance=made, model="x\n---\nlicense: mit").save_pretrained(tmp_path / "plan")
    card = card_of(tmp_path / "plan", tmp_path / "card")
    assert card.data.license == "apache-2.0"
    assert "<script" not in card.text.replace("\\<", "")
    assert "\n# [" not in card.text
    assert "\u202e" not in card.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), 'under which licence is it shared? Say license="apache-2.0"'),
        (("--license", "Apache 2"), "no name of the Hub's"),
        (("--license", "yes"), "no name of the Hub's"),
        (("--license", "nan"), "no name of the Hub's"),
        (("--license", "1"), "no name of the Hub's"),
        (("--license", "mit-"), "no name of the Hub's"),
        (("--license", "mit", "--force"), "--force goes with -o"),
        (("--license", "mit", "-o", "x", "--private"), "-o uploads nothing"),
    ],
)
def test_what_push_refuses(options: tuple[str, ...], message: str, steering: Path) -> None:
    assert message in run("push", steering, "you/safer", *options).error


@pytest.mark.parametrize(
    "name", ["", "safer", "a/b/c", "../x", "x/..", "a/b\n```", 'a/b"', "a b/c", "a/b--c", "a/b.git", "ä/b"]
)
def test_what_is_no_repository(name: str, steering: Path, tmp_path: Path) -> None:
    error = run("push", steering, name, "--license", "mit", "-o", tmp_path / "look").error
    assert "is no repository's name; right is OWNER/NAME" in error
    assert not (tmp_path / "look").exists()


def test_nothing_is_written_inside_an_artifact(steering: Path, contrast: Path) -> None:
    for options in (
        ("push", steering, "you/safer", "--license", "mit", "-o", steering / "in"),
        ("compose", steering, "-o", steering / "in" / "it"),
        ("show", contrast, "--table", steering / "t.csv"),
    ):
        assert "lies inside the artifact" in run(*options).error
    assert sorted(path.name for path in steering.iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_places_that_are_taken(steering: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    options = ["you/safer", "--license", "mit", "-o"]
    assert "not empty" in run("push", steering, *options, tmp_path / "mine").error
    assert "other files" in run("push", steering, *options, tmp_path / "mine", "--force").error
    assert "what the command reads" in run("push", steering, *options, steering, "--force").error
    assert "no artifact there" in run("push", tmp_path, "you/safer", "--license", "mit").error
    assert "cannot be uploaded to the Hub" in run("push", steering, "you/safer", "--license", "mit").error
