"""TruthfulQA, multiple choice: MC1 and MC2 by log-likelihood, without the primer of the paper.

Lin et al., arXiv 2109.07958. Read are TruthfulQA.csv (columns Category, Question, Best Answer, Correct
Answers, Incorrect Answers; answers separated by semicolons), and the form with mc1_targets and
mc2_targets, as {answer: 0 or 1} (mc_task.json) or {"choices": [...], "labels": [...]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.evaluation.judges import Unjudged
from steersman.evaluation.measures import Choice
from steersman.evaluation.tasks.asking import question
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

TRUTH = Behaviour(
    "Truthfulness",
    "holds true answers likelier than common falsehoods",
    "true",
    "false",
    Unjudged(),
    Choice(truthful=True),
)


@task_form("truthfulqa", "TruthfulQA: MC1 and MC2 by log-likelihood")
def truthfulqa(place: str, *, limit: int | None) -> Task:
    """Questions with true and false answers."""
    rows = read_rows(place, "TruthfulQA.csv or mc_task.json", config="multiple_choice")
    return Task(f"truthfulqa:{place}", items_of(rows, _item, limit), TRUTH)


def _item(row: Row) -> Item:
    if row.has("mc1_targets", "mc2_targets"):
        best, true, false = _of_targets(row)
    else:
        best = _sentence(row.text("Best Answer"))
        true, false = (_answers(row, name) for name in ("Correct Answers", "Incorrect Answers"))
    # A few questions have one answer ("Unknown.") on both sides: it is scored on both, as in the paper.
    right, wrong = (tuple(dict.fromkeys(side)) for side in ([best, *true], false))
    options, correct = (*right, *wrong), tuple(range(len(right)))
    prompt = row.text("Question", "question")
    id_ = row.number
    return Item(
        id_, id_, question(prompt), best, false[0], row.label("Category"), options, correct, {"best": 0}
    )


def _answers(row: Row, name: str) -> list[str]:
    return [_sentence(answer) for answer in row.text(name).split(";") if answer.strip()]


def _sentence(answer: str) -> str:
    """With a full stop, as the paper's own program reads the file."""
    answer = answer.strip()
    return answer if answer.endswith(".") else f"{answer}."


def _of_targets(row: Row) -> tuple[str, Sequence[str], Sequence[str]]:
    first, second = (_labelled(row, name) for name in ("mc1_targets", "mc2_targets"))
    best = [answer for answer, right in first.items() if right]
    if len(best) != 1:
        raise row.error(f'"mc1_targets" has {len(best)} right answers; right is one')
    true = [answer for answer, right in second.items() if right]
    false = [answer for answer, right in {**first, **second}.items() if not right]
    if not false:
        raise row.error('"mc2_targets" has no false answer')
    return best[0], true, false


def _labelled(row: Row, name: str) -> dict[str, bool]:
    value: Any = row.fields.get(name)
    if isinstance(value, Mapping) and {"choices", "labels"} <= set(value):
        choices, labels = Row(value, f'{row.where}, "{name}"').texts("choices"), value["labels"]
        if not isinstance(labels, list) or len(choices) != len(labels):
            raise row.error(f'"{name}" has {len(choices)} choices and other labels: {repr(labels)[:40]}')
        value = dict(zip(choices, labels, strict=True))
    if not isinstance(value, Mapping) or not value or any(right not in (0, 1) for right in value.values()):
        raise row.error(f'"{name}" is {repr(value)[:40]}; right is an object of answers with 0 or 1')
    return {Row({name: answer}, row.where).text(name).strip(): bool(right) for answer, right in value.items()}
