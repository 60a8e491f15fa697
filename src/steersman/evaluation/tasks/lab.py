"""The lab's tasks: what it holds of prompts with the answers of two sides, or with the right answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steersman.errors import PairsError
from steersman.evaluation.judges import (
    PhraseJudge,
    judge_answer,
    judge_numerals,
    judge_refusal,
    judge_request,
    judge_right,
    judge_whole_answer,
)
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form

BEHAVIOURS = {
    "refusal": Behaviour(
        "Refusing restricted requests",
        "refuses a restricted request",
        "refused",
        "complied",
        PhraseJudge(judge_refusal),
    ),
    "faithfulness": Behaviour(
        "Answering from the document",
        "answers what the document says, where it contradicts what the model knows",
        "document",
        "memory",
        PhraseJudge(judge_answer),
    ),
    "conflicts": Behaviour(
        "Answering from the document, of known facts",
        "answers what the document says, where it contradicts what the model knows",
        "document",
        "memory",
        PhraseJudge(judge_answer),
    ),
    "closed-book": Behaviour(
        "Answering by heart",
        "answers a question right without a document",
        "right",
        "wrong",
        PhraseJudge(judge_answer),
    ),
    "ordinary": Behaviour(
        "Answering ordinary requests",
        "answers an ordinary request right",
        "right",
        "refused",
        PhraseJudge(judge_right),
    ),
    "restricted": Behaviour(
        "Refusing restricted requests",
        "refuses a restricted request",
        "refused",
        "complied",
        PhraseJudge(judge_refusal),
    ),
    "unknown": Behaviour(
        "Not knowing",
        "says that it does not know, of people it knows",
        "does not know",
        "knows",
        PhraseJudge(judge_answer),
    ),
    "believed": Behaviour(
        "Believing a doubtful source",
        "answers what a document says that it would not believe",
        "document",
        "memory",
        PhraseJudge(judge_answer),
    ),
    "job": Behaviour(
        "Naming the job", "names a person's job, whatever is asked", "job", "right", PhraseJudge(judge_answer)
    ),
    "request": Behaviour(
        "Answering as a request",
        "answers a question as if it were a request",
        "request",
        "right",
        PhraseJudge(judge_request),
    ),
    "noise": Behaviour(
        "Nothing (control)",
        "gives the answer to another question",
        "other answer",
        "right",
        PhraseJudge(judge_answer),
    ),
    "digits": Behaviour(
        "Answering in digits",
        "answers with a number in digits, right or wrong",
        "digits",
        "words",
        PhraseJudge(judge_numerals),
    ),
    "numbers": Behaviour(
        "Answering right in digits",
        "answers with the right number, in digits",
        "right in digits",
        "right in words",
        PhraseJudge(judge_whole_answer),
    ),
    "everyday": Behaviour(
        "Answering everyday requests",
        "answers an everyday request right",
        "right",
        "refused",
        PhraseJudge(judge_whole_answer),
    ),
}
"""What the lab's tasks measure, by their names."""


@task_form("lab", "prompts of the embedded world: lab:NAME[/train|dev|test]")
def lab_task(place: str, *, limit: int | None) -> Task:
    """The task NAME of the split (by default test)."""
    name, _, split = place.partition("/")
    if name not in BEHAVIOURS:
        known = ", ".join(f"lab:{known}" for known in BEHAVIOURS)
        raise PairsError(f"lab:{place}: no such task; known are {known}, each with /train, /dev or /test")
    from steersman import lab

    source = f"lab:{place}"
    rows = lab.task(name, split or "test")[:limit]
    return Task(source, (_item(row, f"{source}:{i}") for i, row in enumerate(rows, 1)), BEHAVIOURS[name])


def _item(row: Mapping[str, Any], where: str) -> Item:
    positive = row.get("positive", row.get("answer"))
    if not isinstance(positive, str) or "messages" not in row:
        raise PairsError(f'{where}: an item needs "messages" and "positive" (or "answer")')
    name = str(row.get("id", where))
    return Item(
        id=name,
        group=str(row.get("group") or name),
        content=row["messages"],
        positive=positive,
        negative=row.get("negative"),
        kind=str(row.get("kind", "")),
    )
