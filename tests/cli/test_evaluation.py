"""evaluate, end to end: a tiny checkpoint, files of one's own, killed and resumed, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import run, save_tiny
from steersman.cli.evaluation import _measured_by
from steersman.evaluation.result import PREFERENCE
from steersman.evaluation.run_store import append
from waiting import wait_until

QUESTIONS = ["who wrote the book?", "is the river long?", "what is beside it?", "was the town old?"]


@pytest.fixture(scope="session")
def task_file(made: Callable[[str], Path]) -> Path:
    path = made("task") / "questions.jsonl"
    rows = [
        {
            "prompt": question,
            "positive": "the teacher",
            "negative": "a river",
            "kind": ("people", "places")[number % 2],
            "group": f"g{number // 2}",
        }
        for number, question in enumerate(QUESTIONS * 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def plan(made: Callable[[str], Path], contrast: Path) -> Path:
    folder = made("plan") / "plan"
    assert run("select", contrast, "-o", folder, "--top", 2).status == 0
    return folder


def arguments(tiny: Path, task_file: Path, plan: Path, out: Path) -> list[object]:
    return [
        "evaluate", tiny, "--task", task_file, "--steering", f"helpful={plan}", "--random", 2,
        "--control-items", 4, "--max-new-tokens", 4, "--batch-size", 4, "--shown", 2, "--no-cache", "-o", out,
    ]  # fmt: skip


def test_evaluate_writes_figures_items_and_reports(
    tiny: Path, task_file: Path, plan: Path, contrast: Path, tmp_path: Path
) -> None:
    attacks = tmp_path / "attacks.jsonl"
    attacks.write_text('{"name": "polite", "template": "please: {prompt}"}\n')
    (tmp_path / "text.txt").write_text("The river is long.\n\nThe town beside it is old.\n")
    out = tmp_path / "out"
    found = run(
        *arguments(tiny, task_file, plan, out),
        "--side", f"text:{tmp_path / 'text.txt'}", "--reverse", "--strengths", "0.5",
        "--instruction", "be helpful", "--attacks", attacks, "--contrast", contrast, "--attach", "--json",
    ).json  # fmt: skip
    assert found["output"] == str(out)
    told = json.loads((out / "evaluation.json").read_text())
    assert {**told, "output": str(out)} == found
    assert sorted(path.name for path in out.iterdir()) == [
        "card.md", "evaluation.json", "items.jsonl", "report.html", "report.md",
    ]  # fmt: skip
    assert [arm["name"] for arm in told["arms"]] == [
        "base", "helpful", "helpful reversed", "prompt", "prompt+helpful", "helpful@0.5",
        "polite", "polite × helpful",
    ]  # fmt: skip
    effect, side = told["tasks"]
    assert (effect["role"], side["role"]) == ("effect", "side")
    assert effect["items"] == 12
    assert set(effect["kinds"]) == {"people", "places"}
    assert side["results"]["helpful"]["kl"]["mean"] > 0
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert len(lines) == 12 * 8 + side["items"] * 6
    assert {line["arm"] for line in lines if line["task"] == effect["name"]} == {
        a["name"] for a in told["arms"]
    }
    manifest = json.loads((plan / "manifest.json").read_text())
    assert manifest["evidence"], "--attach puts what was found into the plan"
    assert run("show", plan).status == 0
    assert not (tmp_path / "out.partial").exists()


def test_the_card_opens_what_was_measured(
    tiny: Path, task_file: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the strength it was run at, also where a folder's name has a space or is one with a strength."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plan, "my plan")
    assert run("compose", "my plan@0.5", "-o", "half@0.5").status == 0
    told = run(
        "evaluate", tiny, "--task", task_file, "--steering", "my plan@0.3333333", "--steering", "half@0.5",
        "--random", 0, "--limit", 2, "--max-new-tokens", 2, "--no-cache", "-o", "out", "--json",
    ).json  # fmt: skip
    card = (tmp_path / "out" / "card.md").read_text()
    assert "--steering 'my plan@0.3333333' --prompt" in card
    assert "--steering half@0.5 --prompt" in card
    assert "name: my plan" in card
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for measured, example in zip(told["steerings"], examples, strict=True):
        found: dict[str, Any] = {}
        exec(example, found)
        assert found["plan"].fingerprint == measured["fingerprint"]


def test_words_name_every_arm_and_the_report(tiny: Path, task_file: Path, plan: Path, tmp_path: Path) -> None:
    words = run(*arguments(tiny, task_file, plan, tmp_path / "out")).words
    for part in ("base", "helpful", "95% interval", "random plans of its shape", "items only", "report.html"):
        assert part in words
    error = run(*arguments(tiny, task_file, plan, tmp_path / "out")).error
    assert "not empty" in error
    again = run(*arguments(tiny, task_file, plan, tmp_path / "out"), "--force", "--json").json
    assert again["tasks"][0]["items"] == 12


def test_a_concept_is_compared_with_its_label_shuffled_ones(
    tiny: Path, task_file: Path, pairs_file: Path, tmp_path: Path
) -> None:
    concept, vector = tmp_path / "concept", tmp_path / "vector"
    assert run("refine", tiny, pairs_file, "-o", concept).status == 0
    assert run("steer", concept, "-o", vector, "--strength", "dose:0.3", "--layers", 1).status == 0
    given = arguments(tiny, task_file, vector, tmp_path / "out")
    found = run(*given, "--concept", concept)
    assert found.status == 0, found.stderr
    assert "helpful among label-shuffled concepts (how much likelier" in found.words
    assert "change of d (nats)" in found.words
    told = json.loads((tmp_path / "out/evaluation.json").read_text())["tasks"][0]["random"]
    assert [(of["family"], len(of["draws"])) for of in told] == [("random", 2), ("shuffled", 2)]
    report = (tmp_path / "out/report.md").read_text()
    assert "Label-shuffled concepts, matched: concepts of the same pairs" in report
    assert "| 2 label-shuffled concepts |" in report
    assert "not measured: label-shuffled" not in (tmp_path / "out/card.md").read_text()
    assert run(*given, "--force").status == 0
    assert "not measured: label-shuffled concepts" in (tmp_path / "out/card.md").read_text()
    for wrong, said in (
        (["--concept", concept, "--map", vector], "vector"),
        (["--concept", vector], "a steering"),
    ):
        again = run(*given, "--force", *wrong)
        assert again.status == 2
        assert said in again.error


def test_what_random_plans_are_compared_by_is_said_in_words() -> None:
    assert _measured_by({"measure": PREFERENCE}) == "how much likelier the positive answer is, log-odds"
    assert _measured_by({"measure": "positive"}) == "positive"


def test_a_killed_run_goes_on_where_it_was(tiny: Path, task_file: Path, plan: Path, tmp_path: Path) -> None:
    command = [str(part) for part in arguments(tiny, task_file, plan, tmp_path / "killed")]
    partial = tmp_path / "killed.partial" / "batches.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from steersman.cli import main; sys.exit(main())", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists(), "it ended before it could be killed"
    done = partial.read_bytes().count(b"\n")
    refused = run(*command).error
    assert "--resume" in refused
    reported = run(*command, "--finished").words
    assert re.search(r"unfinished: (4|8|12) of 12 items are finished|unfinished: \d of 2 random", reported)
    assert "random plans" in (tmp_path / "killed" / "report.html").read_text()
    assert partial.read_bytes().count(b"\n") == done
    assert "evidence is of a whole run" in run(*command, "--finished", "--attach", "--force").error
    resumed = run(*command, "--resume", "--force", "--json").json
    whole = run(*arguments(tiny, task_file, plan, tmp_path / "whole"), "--json").json
    assert done >= 2
    assert {**resumed, "created": "", "output": ""} == {**whole, "created": "", "output": ""}
    first, second = ((tmp_path / name / "items.jsonl").read_text() for name in ("killed", "whole"))
    assert first == second


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--task", "lab:nothing"], "no such task"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "unheard:of"], "right is lab:NAME"),
        (["--limit", "13"], "12"),
        (["--strengths", "0.5,x"], "0.25,0.5,0.75"),
        (["--strengths", "nan"], "0.25,0.5,0.75"),
        (["--strengths", "3"], "scaled by 3"),
        (["--steering", "helpful=nowhere"], "nowhere"),
        (["--reversed", "other=PLAN"], "no steering 'other'"),
        (["--other", "nonsense"], "NAME=MODEL"),
        (["--attacks", "BAD"], "bad.jsonl:1"),
        (["--attacks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--defences", "EMPTY"], "holds nothing"),
        (["--judge", "nobody"], "nobody"),
        (["--screen", "PLAN"], "a causal screen is needed"),
        (["--contrast", "PLAN"], "a routing contrast is needed"),
        (["--random", "-1"], "--random"),
        (["--instruction", " "], "the instruction is ' '"),
        (["--instruction", "\udcff"], "half a character"),
        (["--other", "a=b", "--other", "a=c"], "two are called 'a'"),
        (["--reversed", "PLAN", "--reversed", "helpful=PLAN"], "reversed twice"),
        (["--reverse", "--reversed", "PLAN"], "right is one of them"),
        (["--limit", "9" * 30], "there are 12"),
        (["-o", "PLAN"], "not empty"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, task_file: Path, plan: Path, tmp_path: Path, changed: list[str], said: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"name": "a", "template": 3}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    places: dict[str, Any] = {"BAD": bad, "EMPTY": tmp_path / "empty.jsonl", "PLAN": plan}
    given = [str(places.get(part, part)).replace("PLAN", str(plan)) for part in changed]
    base = arguments(tiny, task_file, plan, tmp_path / "out")
    if changed[0] == "-o":
        base = base[:-2]
    error = run(*base, *given).error
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model_is_refused_before_the_work(
    dense: Path, task_file: Path, plan: Path, tmp_path: Path
) -> None:
    error = run(*arguments(dense, task_file, plan, tmp_path / "out")).error
    assert "this steering is for" in error
    assert not (tmp_path / "out.partial").exists()


def test_a_plan_for_what_is_generated_is_compared_by_the_task_itself(
    tiny: Path, task_file: Path, contrast: Path, tmp_path: Path
) -> None:
    """It changes nothing before the first token, so that tells nothing of it."""
    plan = tmp_path / "plan"
    assert run("select", contrast, "-o", plan, "--top", 2, "--scope", "generated").status == 0
    (task,) = run(*arguments(tiny, task_file, plan, tmp_path / "out"), "--limit", 4, "--json").json["tasks"]
    assert task["random"][0]["measure"] == "positive"
    assert list(task["preferences"]) == ["base"]


def test_a_prompt_beyond_the_context_is_refused(task_file: Path, tmp_path: Path) -> None:
    short = save_tiny(tmp_path / "short", context=16)
    error = run("evaluate", short, "--task", task_file, "--no-cache", "-o", tmp_path / "out").error
    assert "questions.jsonl: base: a prompt of" in error
    assert "context holds 16" in error


def test_progress_with_too_few_items_is_run_again(
    tiny: Path, task_file: Path, plan: Path, tmp_path: Path
) -> None:
    command = [*arguments(tiny, task_file, plan, tmp_path / "out"), "--limit", 4]
    whole = run(*command, "--json").json
    shutil.rmtree(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("steersman.evaluation.result.Evaluation.save", lambda *_, **__: 1 / 0)
        assert run(*command).status == 1
    batches = tmp_path / "out.partial" / "batches.jsonl"
    first, *others = batches.read_bytes().splitlines(keepends=True)
    key, entry = json.loads(first)["key"], json.loads(first)["entry"]
    entry["items"].pop()
    batches.write_bytes(b"".join(others))
    append(batches, key, entry)
    refused = run(*command, "--resume", "--dtype", "bfloat16").error
    assert "differs in dtype (torch.float32 there, torch.bfloat16 here);" in refused
    again = run(*command, "--resume", "--json").json
    assert {**again, "created": ""} == {**whole, "created": ""}


def test_a_checkpoints_own_way_of_decoding_is_not_used(tiny: Path, task_file: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    settings = json.loads((tiny / "generation_config.json").read_text())
    settings |= {"do_sample": True, "min_p": 0.9, "return_dict_in_generate": True, "stop_strings": ["never"]}
    (other / "generation_config.json").write_text(json.dumps({**settings, "penalty_alpha": 0.6, "top_k": 2}))
    (tmp_path / "prompts.txt").write_text("The river\n")
    rest = ["--side", f"diversity:{tmp_path / 'prompts.txt'}", "--task", task_file, "--no-cache"]
    plain, changed = (
        run(
            "evaluate", model, *rest, "--max-new-tokens", 4, "-o", tmp_path / f"{model.name}-out", "--json"
        ).json
        for model in (tiny, other)
    )
    assert changed["tasks"] == plain["tasks"]
