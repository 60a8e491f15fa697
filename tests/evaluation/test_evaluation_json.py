"""Evaluations from disk: what the schema takes is shown, what is damaged, foreign or newer is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from made_results import DRAWN, NAMES, made_result

from cli.command_line import run
from steersman import ArtifactError
from steersman.evaluation import figures
from steersman.evaluation.evaluation_report import (
    check_evaluation,
    evaluation_schema,
    write_evaluation_report,
)

EVERY = 10
"""Of the places at which a value is changed, one in so many: all of them take a minute."""


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes its time; the pictures are looked at where the page is opened."""
    for name in DRAWN:
        monkeypatch.setattr(figures, name, lambda *_, **__: b"png")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_result()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if path and path[-1] in ("provenance", "settings", "record", "scores"):
        return  # free, but for being objects
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if not isinstance(key, int) or key < 1:
            yield from places(inside, (*path, key))


def changed_at(result: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return changed


def complaint(act: Callable[[], object]) -> str:
    """What is said where something is refused; empty where it is not."""
    try:
        act()
    except ArtifactError as error:
        return str(error)
    return ""


def test_whatever_the_schema_takes_is_shown(result: dict[str, Any], tmp_path: Path) -> None:
    """A value of another kind at any place: refused with one line that says where, or the report is made."""
    small = copy.deepcopy(result)
    small["tasks"], small["arms"] = small["tasks"][:1], small["arms"][:3]
    for part in ("results", "differences", "preferences"):
        small["tasks"][0][part] = {a: of for a, of in small["tasks"][0][part].items() if a in NAMES[:3]}
    spots = list(places(small))
    assert len(spots) > 200
    refused = []
    for number, path in enumerate(spots[::EVERY]):
        value = [None, "x", -1, [], {}, True, 0.5][number % 7]
        changed = changed_at(small, path, value)
        said = complaint(partial(check_evaluation, changed))
        if not said:
            said = complaint(partial(write_evaluation_report, tmp_path, changed))
            assert not said or "evaluation.json: not of the expected form" in said
        refused.append(bool(said))
        assert "\n" not in said
    assert sum(refused) > len(refused) / 2


def test_the_report_command(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    assert run("report", tmp_path, "--json").json == {
        "output": str(tmp_path),
        "files": ["report.html", "report.md", "card.md"],
    }
    before = (tmp_path / "report.html").read_bytes()
    assert "report.md" in run("report", tmp_path).words
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("card.md", "evaluation.json", "report.html", "report.md")
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"format": "steersman"}', 'not an evaluation ("format" is not "steersman-evaluation")'),
        ('{"format": "steersman-evaluation", "format_version": 2}', "upgrade steersman"),
        ('{"format": "steersman-evaluation", "format_version": 1}', "is a required property"),
        ('{"format": "steersman-evaluation", "format_version": NaN}', "NaN is not a number"),
    ],
)
def test_what_is_no_evaluation_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    done = run("report", tmp_path)
    assert done.status == 2
    assert done.remarks.count("\n") == 1
    assert words in done.remarks
    assert str(tmp_path / "evaluation.json") in done.remarks
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_damaged_number_is_named(result: dict[str, Any], tmp_path: Path) -> None:
    changed = changed_at(result, ("tasks", 0, "results", "base", "positive", "rate"), "much")
    (tmp_path / "evaluation.json").write_text(json.dumps(changed), encoding="utf-8")
    done = run("report", tmp_path)
    assert done.status == 2
    assert "tasks[0].results.base.positive.rate: 'much' is not of type 'number'" in done.remarks
    assert run("report", tmp_path / "nowhere").status == 2


def test_the_schema_is_one(result: dict[str, Any]) -> None:
    schema = evaluation_schema()
    check_evaluation(result)
    assert set(schema["required"]) == set(result)
