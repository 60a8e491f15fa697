"""tune from the command line: what it writes, a stop and what comes after it, each wrong thing in a line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from cli.command_line import run
from steersman import Steering, lab, load_pairs
from steersman.concepts.fitting import fit_affine_map
from steersman.concepts.refinement import refine_concept
from steersman.errors import PairsError
from steersman.evaluation.tuning import run as tuning_run
from steersman.experts.counting import detect_experts

FEW = ("--dev-items", 12, "--test-items", 12, "--cost-items", 12, "--no-answers", "--controls", 1)
WORDS = ("Who wrote the book?", "The river is long.", "I cannot help.", "Answer: the teacher.", "Yes.")
TASKS = ("--task", "lab:refusal", "--keep", "lab:ordinary")
QUICK = (*TASKS, *FEW, "--doses", "0.2,0.4")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at tests are counted here, not among the user's own."""
    monkeypatch.setattr("steersman.evaluation.tuning.looks.cache_directory", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept of the lab's source, another, a map to its target, and a contrast."""
    folder = tmp_path_factory.mktemp("tuned")
    source, tokenizer = lab.load("source")
    for name in ("refusal", "faithfulness"):
        pairs = load_pairs(f"lab:{name}/dev")[:24]
        refine_concept(source, tokenizer, pairs).save_pretrained(folder / name)
    bridge = fit_affine_map(
        (source, tokenizer), lab.load("target"), [f"{a} {b}" for a in WORDS for b in WORDS]
    )
    bridge.save_pretrained(folder / "bridge")
    model, own = lab.load("moe")
    detect_experts(model, own, load_pairs("lab:refusal/dev")[:24]).save_pretrained(folder / "contrast")
    return folder


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.evaluation.tuning.looks.cache_directory", lambda: place / "cache")
        found = run("tune", "lab:source", place / "refusal", *QUICK, "-o", place / "safer", "--json").json
    (place / "said.json").write_text(json.dumps(found))
    return place / "safer"


def test_tune_writes_the_plan_the_table_and_the_pictures(tuned: Path) -> None:
    said = json.loads((tuned.parent / "said.json").read_text())
    plan = Steering.from_pretrained(tuned)
    report = tuned.with_name("safer-tuning")
    assert {file.name for file in report.iterdir()} == {
        "tuning.json", "candidates.csv", "effect_and_cost.png", "curve.png"
    }  # fmt: skip
    found = json.loads((report / "tuning.json").read_text())
    assert found["fingerprint"] == plan.fingerprint == said["fingerprint"]
    assert found["chosen"] == said["chosen"]
    assert found["confirmed"] == said["confirmed"]
    assert said["candidates"] == len(found["candidates"])
    assert found["why_none"] is None
    # The largest effect of those that pass, and the plan that says so.
    passing = [one for one in found["candidates"] if one["passes"]]
    assert found["chosen"]["effect"] == max(one["effect"] for one in passing)
    assert all(one["costs"]["kl"]["upper"] <= 0.3 for one in passing)
    assert {edit.scope for edit in plan.edits} == {"answer"}
    assert plan.provenance["tuning"]["chosen"]["dose"] == found["chosen"]["dose"]
    confirmed = found["confirmed"]
    assert (confirmed["items"], len(confirmed["control"]["draws"]), confirmed["looks"]) == (12, 1, 1)
    assert confirmed["verdict"] == "cannot tell"  # one control can show nothing
    rows = list(csv.DictReader((report / "candidates.csv").open()))
    assert [float(row["effect"]) for row in rows] == sorted((float(r["effect"]) for r in rows), reverse=True)
    assert (report / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not tuned.with_name("safer.partial").exists()
    assert "safer" in run("show", tuned).words


def test_words(place: Path, tmp_path: Path) -> None:
    words = run(
        "tune", "lab:source", place / "refusal", place / "faithfulness", *TASKS, *FEW[:6], "--controls", 1,
        "--answer-controls", 1, "--finalists", 2, "--max-new-tokens", 4, "--layers", 1, "--doses", "0.3",
        "--scope", "answer", "--scope", "all", "--side", "negative", "--seed", 1, "--batch-size", 8,
        "--report", tmp_path / "r", "-o", tmp_path / "s",
    ).words  # fmt: skip
    assert "dose -" in words  # away from it
    assert "on test items:" in words
    assert "answers: " in words
    assert f"table and pictures: {tmp_path / 'r'}" in words
    concepts = {row["concept"] for row in csv.DictReader((tmp_path / "r" / "candidates.csv").open())}
    assert concepts == {"refusal", "faithfulness"}
    finalists = json.loads((tmp_path / "r" / "tuning.json").read_text())["finalists"]
    assert len(finalists) == 2  # of one layer, where no other is offered


def test_finalists_are_unlike_each_other(place: Path, tmp_path: Path) -> None:
    run(
        "tune", "lab:source", place / "refusal", *TASKS, *FEW[:6], "--controls", 0, "--doses", "0.2,0.25",
        "--finalists", 2, "--cost", "kl <= 9", "--max-new-tokens", 4, "-o", tmp_path / "s",
    )  # fmt: skip
    table = json.loads((tmp_path / "s-tuning" / "tuning.json").read_text())
    (best, *_), (one, other) = table["candidates"], table["finalists"]
    assert one["layers"] == best["layers"]
    assert one["layers"] != other["layers"]
    assert {"answers", "answers_base", "repeats"} <= {*one}
    assert {"repeats", "repeats_base"} <= {*table["confirmed"]["answers"]}


def test_a_map_with_a_concept_and_a_contrast(place: Path, tmp_path: Path) -> None:
    paths = place / "bridge", place / "refusal"
    run(
        "tune", "lab:target", *paths, *TASKS, *FEW[:6], "--controls", 1, "--layers", "0-1", "--doses", "0.3",
        "--cost", "kl <= 9", "--finalists", 1, "--max-new-tokens", 4, "-o", tmp_path / "m", "--json",
    )  # fmt: skip
    table = json.loads((tmp_path / "m-tuning" / "tuning.json").read_text())
    assert {layer for one in table["candidates"] for layer in one["layers"]} == {0, 1}
    # Of one finalist nothing is to be chosen: it answers test items alone.
    assert [{"answers", "answers_base"} & {*one} for one in table["finalists"]] == [set()]
    assert table["confirmed"]["answers"]["items"] == 12
    found = run("tune", "lab:moe", place / "contrast", *TASKS, *FEW, "-o", tmp_path / "e", "--json").json
    assert set(found["chosen"]) >= {"kind", "experts", "scope"}
    assert Steering.from_pretrained(tmp_path / "e").strengths


def test_a_stop_and_what_comes_after_it(
    place: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "safer"
    arguments = ("tune", "lab:source", place / "refusal", *QUICK, "-o", out)

    def stop(*_: object) -> None:
        raise PairsError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(tuning_run, "count_look", stop)
        assert "stopped" in run(*arguments).error
    assert not out.exists()
    assert not out.with_name("safer-tuning").exists()
    assert "go on from it with --resume" in run(*arguments).error
    other = run(*arguments[:3], *TASKS, *FEW, "--doses", "0.3", "-o", out, "--resume").error
    assert "progress of another evaluation, which differs in" in other
    for other_way in (("--dtype", "bfloat16"), ("--chat-template", template(tmp_path))):
        assert "which differs in" in run(*arguments, *other_way, "--resume").error, other_way
    copy = tmp_path / "torn"
    shutil.copytree(out.with_name("safer.partial"), copy.with_name("torn.partial"))
    run(*arguments, "--resume", "--json")
    for file in ("tuning.json", "candidates.csv"):
        again = (tmp_path / "safer-tuning" / file).read_bytes()
        assert again == tuned.with_name("safer-tuning").joinpath(file).read_bytes()
    assert Steering.from_pretrained(out).fingerprint == Steering.from_pretrained(tuned).fingerprint
    for damaged in ("{", '{"format": "steersman-evaluation-progress", "run": {"settings": [1, 2]}}'):
        (copy.with_name("torn.partial") / "manifest.json").write_text(damaged)
        assert "damaged" in run(*arguments[:-1], copy, "--resume").error


def template(folder: Path) -> Path:
    """A chat template of one's own."""
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (folder / "other.jinja").write_text(text)
    return folder / "other.jinja"


def test_nothing_right_to_lose(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "positive": "unheard", "group": f"g{n}"} for n in range(420)]
    (tmp_path / "unknown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = run(
        "tune", "lab:source", place / "refusal", "--task", "lab:refusal",
        "--keep", tmp_path / "unknown.jsonl", "--cost", "lost <= 0.1", *FEW[:4], "--no-answers",
        "--controls", 0, "--doses", "0.2", "--layers", 1, "-o", tmp_path / "s",
    ).error  # fmt: skip
    assert "answers none of 210 kept items right" in error


def test_nothing_passes(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    error = run(
        "tune", "lab:source", place / "refusal", *QUICK, "--cost", "kl <= 0.0", "-o", out, "--json"
    ).error
    assert "nothing passes: of" in error
    assert "none keeps kl <= 0 by its one-sided 95 % bound" in error
    table = tmp_path / "none-tuning" / "candidates.csv"
    assert error.endswith(f"every candidate is in {table}")
    assert len(list(csv.DictReader(table.open()))) >= 4
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("none")] == ["none-tuning"]


def test_what_cannot_be_tuned_is_said_before_any_work(place: Path, tuned: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    concept = ("tune", "lab:source", place / "refusal")
    contrast = ("tune", "lab:moe", place / "contrast")
    two_maps = tmp_path / "bridge2"
    shutil.copytree(place / "bridge", two_maps)
    wrong = {
        "a steering is not tuned": ("tune", "lab:source", tuned, *QUICK),
        "do not go together": ("tune", "lab:target", place / "bridge", two_maps, place / "refusal", *QUICK),
        "layers and doses are of vectors": (*contrast, *TASKS, *FEW, "--layers", 1),
        "right is NAME <= NUMBER": (*concept, *QUICK, "--cost", "kl >= 1"),
        "keeps 99 label-shuffled concepts, and 100 controls": (*concept, *TASKS, "--controls", 100),
        "12 kept items in this half": (*concept, *QUICK, "--cost", "lost <= 0.05"),
        "is among the development items": (
            *concept, *QUICK, "--task", "lab:refusal/dev", "--test", "lab:refusal/dev",
        ),
        "is, holds or is inside": (*concept, *QUICK, "--report", tmp_path / "x" / "r"),
        "is kept twice": (*concept, *QUICK, "--keep", "lab:ordinary"),
        "right is NAME <= NUMBER, such": (*concept, *QUICK, "--cost", "kl <= ٣"),
        "--no-answers do not go with it": (
            *concept, "--task", judged(tmp_path), "--keep", "lab:ordinary", *FEW,
        ),
        "no such task": (*concept, "--task", "lab:nothing", "--keep", "lab:ordinary", *FEW),
        "the concept has no layer 9": (*concept, *QUICK, "--layers", 9),
        "number above 0": (*concept, *TASKS, *FEW, "--doses", "-1"),
        "scope generated steers nothing": (*concept, *QUICK, "--scope", "generated"),
        "neither options nor a right answer": (
            *concept, "--task", "lab:refusal", "--keep", few_words(tmp_path), *FEW[:4], "--controls", 1,
            "--cost", "lost <= 0.05",
        ),
    }  # fmt: skip
    for message, arguments in wrong.items():
        assert message in run(*arguments, *out).error, message
    assert "not empty" in run(*concept, *QUICK, "-o", tuned).error
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x-tuning").exists()
    report = tmp_path / "report"
    report.mkdir()
    (report / "mine.txt").write_text("mine")
    assert "report" in run(*concept, *QUICK, "--report", report, *out).error
    assert "other files" in run(*concept, *QUICK, "-o", occupied(tmp_path)).error


def judged(folder: Path) -> Path:
    """A task of prompts alone, whose answers a judge tells."""
    form = {"scorer": "refusal", "title": "Refuses", "does": "refuses", "sides": ["refused", "answered"]}
    items = ({"prompt": f"Item {n}", "positive": "I cannot.", "group": f"g{n}"} for n in range(60))
    rows = [form, *items]
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "judged.jsonl"


def few_words(folder: Path) -> Path:
    """A task of patterns, whose items have no right answer."""
    form = {"scorer": "regex", "title": "Yes", "does": "says yes", "sides": ["yes", "no"]}
    rows = [form, *({"prompt": f"Item {n}", "positive": "yes|yeah", "group": f"g{n}"} for n in range(420))]
    (folder / "patterns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "patterns.jsonl"


def occupied(folder: Path) -> Path:
    """An output beside which somebody else's files stand where progress goes."""
    partial = folder / "y.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    return folder / "y"
