"""`steersman judge`: an evaluation's answers judged anew, and a judge compared with people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import run

ANSWERS = ["I cannot help.", "Sure.", "I cannot help.", "No way.", "Sure."]


def record(number: int, arm: str, text: str) -> dict[str, Any]:
    chat = [{"role": "user", "content": f"Question {number}?"}]
    return {
        "task": "t",
        "arm": arm,
        "id": f"i{number}",
        "group": f"g{number // 2}",
        "kind": "",
        "prompt": chat,
        "positive": "No",
        "negative": None,
        "text": text,
        "outcome": "negative",
        "scores": {},
        "why": "",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [record(number, arm, text) for arm in ("base", "steered") for number, text in enumerate(ANSWERS)]
    return write(tmp_path / "items.jsonl", rows).parent


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_another_judge(folder: Path) -> None:
    found = run("judge", folder, "--judge", "refusal", "--json").json
    counts = {"positive": 2, "negative": 3, "neither": 0, "unjudged": 0}
    assert found["arms"] == {"base": counts, "steered": counts}
    assert (found["task"], found["judge"]["list"], found["agreement"]) == ("t", "refusals", None)
    words = run("judge", folder / "items.jsonl", "--judge", "refusal", "--arm", "base").words
    assert words.splitlines()[-1].split() == ["base", "2", "3", "0", "0"]


def test_agreement_with_people(folder: Path, tmp_path: Path) -> None:
    people = ["positive", "negative", "positive", "positive"]
    labels = tmp_path / "people.csv"
    labels.write_text("id,label\n" + "".join(f"i{n},{label}\n" for n, label in enumerate(people)))
    arguments = ("judge", folder, "--labels", labels, "--judge", "refusal", "--arm", "base")
    found = run(*arguments, "--json").json["agreement"]
    assert found["table"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["kappa"] == pytest.approx(0.5)
    assert (found["count"], found["share"], found["method"]) == (4, 0.75, "bootstrap over groups")
    assert "agreement with people: kappa 0.50" in run(*arguments).words
    # The sides that are recorded, which are all negative.
    assert (
        run("judge", folder, "--labels", labels, "--arm", "base", "--json").json["agreement"]["share"] == 0.25
    )


def test_labels_of_several_arms(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": "i0", "label": "positive", "arm": arm} for arm in ("base", "steered")]
    labels = write(tmp_path / "people.jsonl", rows)
    assert run("judge", folder, "--labels", labels, "--json").json["agreement"]["count"] == 2
    assert run("judge", folder, "--labels", labels, "--arm", "base", "--json").json["agreement"]["count"] == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([{"id": "i0", "label": "positive"}], r':1: "arm" is missing, and there are several: base, steered'),
        (
            [{"id": "i0", "label": "good", "arm": "base"}],
            r""":1: "label" is 'good'; right is one of positive""",
        ),
        ([{"id": "i9", "label": "positive", "arm": "base"}], r':1: no answer of the item "i9" is recorded'),
        ([{"id": "i0", "label": "positive", "arm": "base"}] * 2, r':2: "i0" is labelled twice'),
        ([{"id": "i0", "label": "positive", "arm": "other"}], "no label of an answer"),
        ([{"id": "i0", "arm": "base"}], r':1: "label" is missing'),
    ],
)
def test_wrong_labels(folder: Path, tmp_path: Path, labels: list[dict[str, Any]], said: str) -> None:
    assert said in run("judge", folder, "--labels", write(tmp_path / "l.jsonl", labels)).error


def test_wrong_records(folder: Path, tmp_path: Path) -> None:
    assert "name a --judge" in run("judge", folder).error
    assert "no task 'other'; there are t" in run("judge", folder, "--judge", "exact", "--task", "other").error
    assert (
        "no arm 'x'; there are base, steered" in run("judge", folder, "--judge", "exact", "--arm", "x").error
    )
    assert "no such file" in run("judge", tmp_path / "none" / "items.jsonl", "--judge", "exact").error
    for wrong, said in (
        ({"text": None}, ':1: "text" is None'),
        ({"outcome": "good"}, """:1: "outcome" is 'good'"""),
        ({"id": None}, ':1: "id" is None'),
        ({"prompt": 5}, '"prompt" is a number'),
        ({"positive": 5}, ':1: "positive" is 5'),
        ({"facts": "x"}, ':1: "facts" is'),
        ({"facts": {"positives": 5}}, '"positives" of "facts" is 5'),
    ):
        place = write(tmp_path / "wrong.jsonl", [{**record(0, "base", "x"), **wrong}])
        assert said in run("judge", place, "--judge", "exact").error
    twice = write(tmp_path / "twice.jsonl", [record(0, "base", "x")] * 2)
    assert ':2: the answer to "i0" of base is there twice' in run("judge", twice, "--judge", "exact").error
    two = write(tmp_path / "two.jsonl", [record(0, "base", "x"), {**record(0, "base", "x"), "task": "u"}])
    assert "name one of its tasks: t, u" in run("judge", two, "--judge", "exact").error
    assert run("judge", two, "--judge", "exact", "--task", "u", "--json").json["task"] == "u"
