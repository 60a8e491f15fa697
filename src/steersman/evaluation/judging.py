"""Judging what an evaluation has recorded: again by another judge, and against people's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from steersman.errors import PairsError
from steersman.evaluation.judges import OUTCOMES, Judge, Outcome
from steersman.evaluation.judges.agreement import Agreement, agreement
from steersman.evaluation.tasks.item import Item
from steersman.evaluation.tasks.rows import Row, read_rows
from steersman.pairs import Content, check_content

ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Answered:
    """An item's answer under one arm, and its side; None where the judge could not tell."""

    task: str
    arm: str
    item: Item
    text: str
    outcome: Outcome | None


@dataclass(frozen=True)
class Judged:
    """How many answers of each arm are on each side, and how that agrees with people's labels."""

    task: str
    judge: Mapping[str, Any] | None
    answers: tuple[Answered, ...]
    agreement: Agreement | None

    def counts(self) -> dict[str, dict[str, int]]:
        """Arm → side → answers; `unjudged` of which the judge could not tell."""
        found: dict[str, Counter[str]] = {}
        for answer in self.answers:
            found.setdefault(answer.arm, Counter())[answer.outcome or "unjudged"] += 1
        return {arm: {side: count[side] for side in (*OUTCOMES, "unjudged")} for arm, count in found.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "judge": self.judge,
            "arms": self.counts(),
            "agreement": None if self.agreement is None else self.agreement.to_json(),
        }


def judge_records(
    records: str | Path,
    *,
    judge: Judge | None = None,
    labels: str | Path | None = None,
    task: str | None = None,
    arm: str | None = None,
    seed: int = 0,
) -> Judged:
    """Judge an evaluation's answers, compare a judge with people, or both.

    Args:
        records: An evaluation's folder, or its items.jsonl.
        judge: Another judge; None: the sides that are recorded.
        labels: Rows with an answer's `id`, `label` (positive, negative, neither) and, where several arms are
            meant, `arm`. Answers without a label are not compared.
        task: Which of several tasks.
        arm: Which arm alone.
        seed: Of the bootstrap.

    Raises:
        PairsError: a file is wrong (named with its line), or has no such task, arm or answer.
        JudgeError: the judge cannot be had.
    """
    answers = _chosen(read_answers(records), str(records), task, arm)
    if judge is not None:
        verdicts = judge.judge([one.item for one in answers], [one.text for one in answers])
        answers = [
            replace(one, outcome=verdict.outcome) for one, verdict in zip(answers, verdicts, strict=True)
        ]
    compared = None if labels is None else _agreement(answers, labels, seed)
    record = None if judge is None else judge.record()
    return Judged(answers[0].task, record, tuple(answers), compared)


def read_answers(records: str | Path) -> list[Answered]:
    """What an evaluation has recorded. Raises PairsError that names file and line."""
    path = Path(records) / ITEMS if Path(records).is_dir() else Path(records)
    found: dict[tuple[str, str, str], Answered] = {}
    for row in read_rows(str(path), "the items.jsonl of an evaluation"):
        answer = _answer(row)
        key = (answer.task, answer.arm, answer.item.id)
        if key in found:
            raise row.error(f'the answer to "{key[2]}" of {key[1]} is there twice')
        found[key] = answer
    return list(found.values())


def _answer(row: Row) -> Answered:
    item = Item(
        id=row.text("id"),
        group=row.label("group") or row.text("id"),
        content=_prompt(row),
        positive=_optional(row, "positive") or "",
        negative=_optional(row, "negative"),
        kind=row.label("kind"),
        facts=_facts(row),
    )
    text, outcome = row.fields.get("text"), row.fields.get("outcome")
    if not isinstance(text, str):
        raise row.error(f'"text" is {text!r:.40}; right is what the model answered')
    if outcome is not None and outcome not in OUTCOMES:
        raise row.error(f'"outcome" is {outcome!r:.40}; right is one of {", ".join(OUTCOMES)}, or null')
    return Answered(row.text("task"), row.text("arm"), item, text, outcome)


def _prompt(row: Row) -> Content:
    prompt = row.fields.get("prompt")
    if prompt is None:
        return ""
    check_content(prompt, f'{row.where}: "prompt"')
    return cast(Content, prompt)


def _optional(row: Row, name: str) -> str | None:
    value = row.fields.get(name)
    if value is not None and not isinstance(value, str):
        raise row.error(f'"{name}" is {value!r:.40}; right is a text, or null')
    return value


def _facts(row: Row) -> Mapping[str, Any]:
    facts = row.fields.get("facts") or {}
    if not isinstance(facts, dict):
        raise row.error(f'"facts" is {facts!r:.40}; right is what evaluate has written')
    for name in {"positives", "negatives"} & set(facts):
        wordings = facts[name]
        if not isinstance(wordings, list) or not all(isinstance(one, str) for one in wordings):
            raise row.error(f'"{name}" of "facts" is {wordings!r:.40}; right is a list of texts')
    return facts


def _chosen(answers: Sequence[Answered], source: str, task: str | None, arm: str | None) -> list[Answered]:
    tasks = list(dict.fromkeys(one.task for one in answers))
    if task is None and len(tasks) > 1:
        raise PairsError(f"{source}: name one of its tasks: {', '.join(tasks)}")
    chosen = [one for one in answers if task in (None, one.task)]
    if not chosen:
        raise PairsError(f"{source}: no task {task!r}; there are {', '.join(tasks)}")
    arms = list(dict.fromkeys(one.arm for one in chosen))
    if arm is not None and arm not in arms:
        raise PairsError(f"{source}: no arm {arm!r}; there are {', '.join(arms)}")
    return [one for one in chosen if arm in (None, one.arm)]


def _agreement(answers: Sequence[Answered], labels: str | Path, seed: int) -> Agreement:
    places = {(one.arm, one.item.id): one for one in answers}
    arms = {one.arm for one in answers}
    pairs: dict[tuple[str, str], Outcome] = {}
    for row in read_rows(str(labels), 'rows with "id" and "label"'):
        named = row.label("arm")
        if not named and len(arms) > 1:
            raise row.error(f'"arm" is missing, and there are several: {", ".join(sorted(arms))}')
        key, label = (named or min(arms), row.label("id")), row.text("label")
        if key in pairs:
            raise row.error(f'"{key[1]}" is labelled twice')
        if label not in OUTCOMES:
            raise row.error(f'"label" is {label!r}; right is one of {", ".join(OUTCOMES)}')
        if key in places:
            pairs[key] = label
        elif named in arms or not named:
            raise row.error(f'no answer of the item "{key[1]}" is recorded')
    if not pairs:
        raise PairsError(f"{labels}: no label of an answer that is judged")
    chosen = [places[key] for key in pairs]
    groups = [one.item.group for one in chosen]
    return agreement([one.outcome for one in chosen], list(pairs.values()), groups, seed=seed)
