"""What the report says of each task: its sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from steersman.evaluation.evaluation_report import pictures, tables, verdicts
from steersman.evaluation.evaluation_report.numbers import Pieces
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import Table


@dataclass(frozen=True)
class Chapter:
    """One task of the report; pictures are None where there is nothing to draw, or none are wanted."""

    id: str
    title: str
    does: str
    metric: str
    verdicts: Sequence[tuple[Pieces, bool]]
    results: Table
    differences: Table
    method: str
    unjudged: Pieces
    doses: Table | None
    random_sentences: Sequence[Pieces]
    random: Table | None
    preferences: Table | None
    kinds: Table | None
    factorial: Sequence[Table]
    arms_picture: Markup | None = None
    doses_picture: Markup | None = None
    random_pictures: Sequence[tuple[str, Markup]] = ()


def chapters(result: Place, role: str, *, drawn: bool = False) -> list[Chapter]:
    """The tasks of a role, "effect" or "side"."""
    return [
        _chapter(result, task, number, drawn)
        for number, task in enumerate(result["tasks"])
        if task.value["role"] == role
    ]


def _chapter(result: Place, task: Place, number: int, drawn: bool) -> Chapter:
    arms = [
        arm["name"]
        for arm in result.value["arms"]
        if arm["kind"] in ("steered", "reversed") and arm["name"] in task.value["differences"]
    ]
    return Chapter(
        id=f"task-{number}",
        title=task.value["title"],
        does=_does(task),
        metric=task.value["metrics"][0]["title"],
        verdicts=[
            (verdicts.effect_sentence(result, task, arm, titled=False), verdicts.works(result, task, arm))
            for arm in arms
        ],
        results=tables.results_table(result, task),
        differences=tables.differences_table(result, task),
        method=_method(task),
        unjudged=_unjudged(task),
        doses=tables.doses_table(task),
        random_sentences=[
            sentence
            for arm in tables.arms_by(result, "steered")
            for sentence in verdicts.control_sentences(task, arm)
        ],
        random=tables.random_table(task),
        preferences=tables.preferences_table(task),
        kinds=tables.kinds_table(result, task),
        factorial=tables.factorial_tables(task),
        arms_picture=pictures.arms_picture(result, task) if drawn else None,
        doses_picture=pictures.doses_picture(task) if drawn else None,
        random_pictures=pictures.random_pictures(task) if drawn else (),
    )


def _does(task: Place) -> str:
    value = task.value
    return f"{value['name']}: how often the model {value['does']}." if value["does"] else f"{value['name']}."


def _method(task: Place) -> str:
    """How intervals and p-values of the differences were had, as far as they agree."""
    known = [found for of in task.value["differences"].values() for found in of.values() if found]
    intervals = dict.fromkeys(found["method"] for found in known if "method" in found)
    tests = dict.fromkeys(found["test"] for found in known if found.get("test"))
    parts = [f"Intervals: {'; '.join(intervals)}."] if intervals else []
    return " ".join([*parts, *([f"p: {'; '.join(tests)}."] if tests else [])])


def _unjudged(task: Place) -> Pieces:
    pieces: Pieces = ()
    if task.value["sides"] is None:
        return pieces
    for arm, count in (task.value["unjudged"] or {}).items():
        if count:
            pieces = (*pieces, ", " if pieces else "", f"{arm} ", task["unjudged"][arm].number(str))
    return pieces
