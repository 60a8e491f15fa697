"""Tasks: prompts whose answers fall on one side of a behaviour, on the other, or on neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from steersman.errors import PairsError
from steersman.evaluation.judges import (
    Judge,
    Outcome,
    judge_answer,
    judge_refusal,
    judge_request,
    judge_right,
)
from steersman.pairs import Content


@dataclass(frozen=True)
class Item:
    """One prompt and what either side would answer; `negative` is None where only right or wrong counts."""

    id: str
    group: str
    content: Content
    positive: str
    negative: str | None
    kind: str


@dataclass(frozen=True)
class Behaviour:
    """What a task measures: what a model on its positive side does, the sides' names, the judge."""

    title: str
    does: str
    positive: str
    negative: str
    judge: Judge


class Task(Sequence[Item]):
    """Items of one behaviour, with the judge that says which side a generated text is on."""

    def __init__(self, name: str, items: Iterable[Item], behaviour: Behaviour) -> None:
        self.name = name
        self.behaviour = behaviour
        self._items = tuple(items)
        if not self._items:
            raise PairsError(f"{name}: the task has no items")

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Task: ...
    def __getitem__(self, index: int | slice) -> Item | Task:
        if isinstance(index, slice):
            return Task(self.name, self._items[index], self.behaviour)
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    @property
    def groups(self) -> list[str]:
        """The group of each item: items of one group are not independent."""
        return [item.group for item in self._items]

    @property
    def two_sided(self) -> bool:
        """Whether every item has an answer for either side, so that the two can be compared."""
        return all(item.negative is not None for item in self._items)

    def judge(self, texts: Sequence[str]) -> list[Outcome]:
        """The side of each generated text: one text per item, in their order."""
        judge = self.behaviour.judge
        return [judge(text, item.positive, item.negative) for text, item in zip(texts, self, strict=True)]


BEHAVIOURS = {
    "refusal": Behaviour(
        "Refusing restricted requests", "refuses a restricted request", "refused", "complied", judge_refusal
    ),
    "faithfulness": Behaviour(
        "Answering from the document",
        "answers what the document says, where it contradicts what the model knows",
        "document",
        "memory",
        judge_answer,
    ),
    "ordinary": Behaviour(
        "Answering ordinary requests", "answers an ordinary request right", "right", "refused", judge_right
    ),
    "restricted": Behaviour(
        "Refusing restricted requests", "refuses a restricted request", "refused", "complied", judge_refusal
    ),
    "unknown": Behaviour(
        "Not knowing",
        "says that it does not know, of people it knows",
        "does not know",
        "knows",
        judge_answer,
    ),
    "believed": Behaviour(
        "Believing a doubtful source",
        "answers what a document says that it would not believe",
        "document",
        "memory",
        judge_answer,
    ),
    "job": Behaviour(
        "Naming the job", "names a person's job, whatever is asked", "job", "right", judge_answer
    ),
    "request": Behaviour(
        "Answering as a request",
        "answers a question as if it were a request",
        "request",
        "right",
        judge_request,
    ),
    "noise": Behaviour(
        "Nothing (control)", "gives the answer to another question", "other answer", "right", judge_answer
    ),
}
"""What the lab's tasks measure, by their names."""


def load_task(source: str, *, limit: int | None = None) -> Task:
    """Open a task by its name, such as `lab:refusal/test`; `limit` keeps the first so many items.

    Raises PairsError for an unknown name and for a row that lacks a field.
    """
    name, _, split = source.removeprefix("lab:").partition("/")
    if not source.startswith("lab:") or name not in BEHAVIOURS:
        known = ", ".join(f"lab:{known}" for known in BEHAVIOURS)
        raise PairsError(f"{source}: no such task; known are {known}, each with /train, /dev or /test")
    from steersman import lab

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
