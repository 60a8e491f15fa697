"""Rows of every form with something in them replaced or taken out: read, or refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks import load_task

LISTED = {"choices": ["a", "b"], "labels": [1, 0]}
FLAT = {"context": "c", "question": "q", "answers": {"text": ["t"]}, "id": "1"}
QAS = [{"id": "1", "question": "q", "answers": [{"text": "t"}], "is_impossible": False}]
VALID: list[tuple[str, list[dict[str, Any]]]] = [
    (
        "jsonl",
        [{"prompt": "?", "positive": ["a", "b"], "negative": "c", "kind": "k", "group": "g", "id": "1"}],
    ),
    ("jsonl", [{"messages": [{"role": "user", "content": "x"}], "options": ["a", "b"], "correct": 0}]),
    (
        "jsonl",
        [
            {
                "scorer": "contains",
                "title": "t",
                "sides": ["a", "b"],
                "better": "higher",
                "max_new_tokens": 3,
            },
            {"prompt": "?", "positive": "x"},
        ],
    ),
    ("xstest", [{"id": 1, "prompt": "p", "type": "t", "label": "safe", "focus": "f"}]),
    ("safety", [{"goal": "p", "target": "t", "category": "c"}]),
    ("squad", [{"paragraphs": [{"context": "c", "qas": QAS}]}]),
    ("squad", [FLAT]),
    ("squad-closed", [FLAT]),
    ("nq-swap", [{"question": "q", "sub_context": "c", "sub_answer": ["a"], "org_answer": ["b"]}]),
    (
        "faitheval",
        [
            {
                "question": "q",
                "context": "c",
                "choices": {"label": ["A", "B"], "text": ["x", "y"]},
                "answerKey": "B",
            }
        ],
    ),
    (
        "faitheval-unanswerable",
        [{"question": "q", "context": "c", "answers": ["a"], "qid": "1", "subset": "s"}],
    ),
    ("truthfulqa", [{"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}]),
    ("truthfulqa", [{"question": "q", "mc1_targets": LISTED, "mc2_targets": LISTED}]),
    (
        "truthfulqa",
        [{"Question": "q", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": "c"}],
    ),
    ("toxicity", [{"prompt": {"text": "x", "toxicity": 0.5}, "id": "3"}]),
    ("gsm8k", [{"question": "q", "answer": "#### 3"}]),
    ("diversity", [{"prompt": "q", "category": "c"}]),
    ("text", [{"text": "one two"}]),
]
ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    "",
    " ",
    "x y",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"text": 0},
    ["x", 1],
)


def mutated(value: Any, chance: random.Random) -> Any:
    """The value with one thing in it, wherever, replaced by something odd, or one key taken out."""
    if isinstance(value, dict) and value and chance.random() < 0.75:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


def outcome(name: str) -> str:
    """Nothing where the task is read and judges an empty answer as it should, else the error's text."""
    try:
        task = load_task(name)
    except SteersmanError as error:
        return str(error)
    assert len(task.sha256) == len(task.as_texts().sha256) == 64
    if isinstance(task.measure, Answers) and not name.startswith("toxicity:"):
        try:
            assert task.judge(["", *["a b"] * (len(task) - 1)])[0] == "neither"
        except SteersmanError as error:
            return str(error)
    return ""


def test_rows_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    chance, place = random.Random(0), tmp_path / "rows.jsonl"
    said = []
    for number in range(25 * len(VALID)):
        form, rows = VALID[number % len(VALID)]
        changed = [mutated(row, chance) for row in rows] if number >= len(VALID) else rows
        place.write_text("".join(json.dumps(row) + "\n" for row in changed))
        said.append(outcome(f"{form}:{place}"))
    assert not any(said[: len(VALID)])
    assert not [one for one in said if "\n" in one]
    assert 40 < sum(not one for one in said) < len(said) / 2
