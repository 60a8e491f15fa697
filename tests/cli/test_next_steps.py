"""What describe, detect, refine and map name as the next step: commands that run as they stand."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import pytest

from cli.command_line import CHAT, Run, run, write_pairs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of one's own, with pairs."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", range(24))


def following(done: Run) -> list[list[str]]:
    """The commands that a command names."""
    lines = [line.strip() for line in done.words.splitlines() if line.startswith("  steersman ")]
    return [shlex.split(line)[1:] for line in lines]


def test_from_a_mixture_of_experts_to_a_conversation(tiny: Path) -> None:
    (detect,) = following(run("describe", tiny))
    select, chat = following(run(*detect))
    assert detect == ["detect", str(tiny), "pairs.jsonl", "-o", "contrast"]
    assert select[:4] == ["select", "contrast", "-o", "contrast-steering"]
    (hear,) = following(run(*select))
    assert hear == ["chat", str(tiny), "--steering", "contrast-steering"]
    assert following(run("compose", f"{select[3]}@0.5", "-o", "half")) == [[*hear[:3], "half"]]
    assert "receipt  routing changed at" in run(*chat, "--max-new-tokens", 2, stdin="hi").words
    assert following(run("describe", tiny)) == [[*detect[:4], "contrast-2"]]  # the place is taken now


def test_from_a_dense_model_to_a_conversation(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "of us.jinja").write_text("{{ who }}" + CHAT)
    asked = ["--dtype", "float32", "--chat-template", "of us.jinja", "--chat-template-arg", 'who="us all"']
    described = run("describe", dense, *asked)
    assert "Vectors steer it." in described.words
    (refine,) = following(described)
    assert refine == ["refine", str(dense), *asked, "pairs.jsonl", "-o", "concept"]
    steer, chat = following(run(*refine))
    digest = hashlib.sha256((tmp_path / "of us.jinja").read_bytes()).hexdigest()[:8]
    said = f'(its chats had the chat template {digest}…, who="us all": give the same'
    for command in (steer, ["compose", f"{steer[3]}@0.5", "-o", "half"]):
        steered = run(*command)
        assert following(steered) == [["chat", str(dense), "--steering", command[3]]]
        assert said in steered.words
    assert "receipt  states changed at" in run(*chat, "--max-new-tokens", 2, stdin="hi").words
    error = run("detect", dense, "pairs.jsonl", "-o", "contrast").error
    assert "vectors steer dense ones too" in error
    assert "steersman refine MODEL PAIRS -o concept" in error


def test_after_a_map_comes_a_concept(tiny: Path, dense: Path, tmp_path: Path) -> None:
    rows = [f"the river is {number} miles long, and the town beside it is old\n" for number in range(24)]
    (tmp_path / "texts.txt").write_text("".join(rows))
    mapped = run("map", dense, tiny, "texts.txt", "-o", "a map")
    refine, transplant, chat = following(mapped)
    assert refine == ["refine", str(dense), "pairs.jsonl", "-o", "concept"]
    assert transplant[:3] == ["transplant", "concept", "a map"]
    assert chat == ["chat", str(tiny), "--steering", "a map-steering"]
    assert run(*refine).status == 0
    assert run(*transplant, "--force", "--layers", 1).status == 0
    assert "receipt" in run(*chat, "--max-new-tokens", 2, stdin="hi").words
    template = tmp_path / "base.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    given = ("--concept", "concept", "--target-chat-template", template)
    again = following(run("map", dense, tiny, "texts.txt", "-o", "other", *given))
    assert [command[0] for command in again] == ["transplant", "chat"]
    assert all(" ".join(["--chat-template", str(template)]) in " ".join(command) for command in again)


def test_parts_are_merged_first(tiny: Path) -> None:
    assert not following(run("detect", tiny, "pairs.jsonl", "-o", "part", "--shard", "1/2"))


@pytest.mark.parametrize(
    ("model", "pairs"),
    [("lab:moe-prior@3", "lab:refusal"), ("lab:natural", "lab:digits"), ("lab:target", "lab:restricted")],
)
def test_models_of_the_lab_have_pairs_of_the_lab(model: str, pairs: str) -> None:
    from steersman import lab
    from steersman.cli.options import ModelChoice

    named = ModelChoice(model, None, None, None).pairs()
    assert named == f"{pairs}/train"
    assert lab.pairs(pairs.removeprefix("lab:"), "train")
