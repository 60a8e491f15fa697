"""What a task is: prompts, and how what a model makes of them is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, overload, runtime_checkable

from steersman.errors import PairsError
from steersman.evaluation.judges.verdict import Judge, Outcome
from steersman.evaluation.measures.answers import Answers
from steersman.evaluation.measures.measure import Measure
from steersman.evaluation.tasks.asking import as_text
from steersman.pairs import Content
from steersman.showing import SHOWN, Shown, Table, count_of, cut, first_of
from steersman.steering import sha256_of


@dataclass(frozen=True)
class Item:
    """One prompt and what either side would answer.

    `negative` is None where only right or wrong counts. `kind` is the category by which rates are broken
    down. Where answers are chosen from `options`, `correct` are the places of those that are right. `facts`
    is what a measure or judge of its own reads (accepted wordings, constraints, a reference).
    """

    id: str
    group: str
    content: Content
    positive: str
    negative: str | None
    kind: str
    options: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class TaskJudge(Judge, Protocol):
    """A judge that decides by what the task is about."""

    def for_task(self, behaviour: Behaviour) -> Judge:
        """This judge, told which behaviour it judges."""
        ...


@dataclass(frozen=True)
class Behaviour:
    """What a task measures: what a model on its positive side does, and the sides' names.

    `measure` is how: by default greedy answers and `judge`. `answers`: whether an item's two sides are what
    a model would say; a regular expression, or what a judge is told, is not, and has no log-odds.
    """

    title: str
    does: str
    positive: str
    negative: str
    judge: Judge
    measure: Measure | None = None
    answers: bool = True


class Task(Shown, Sequence[Item]):
    """Items of one behaviour, with the judge that says which side a generated text is on.

    Raises PairsError where there is none, or an id is given twice.
    """

    def __init__(self, name: str, items: Iterable[Item], behaviour: Behaviour) -> None:
        self.name = name
        self.behaviour = behaviour
        self._items = tuple(items)
        if not self._items:
            raise PairsError(f"{name}: the task has no items")
        counts = Counter(item.id for item in self._items)
        if twice := [id_ for id_, count in counts.items() if count > 1]:
            raise PairsError(f'{name}: the id "{twice[0]}" is given {counts[twice[0]]} times; right is once')

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

    def in_words(self) -> str:
        """What it measures, by how many items."""
        return f"{self.name}, {count_of(len(self), 'item')}: {self.behaviour.title}"

    def as_tables(self) -> list[Table]:
        """The first items."""
        rows = [(item.id, item.group or "", cut(item.content)) for item in self._items[:SHOWN]]
        return [first_of(("item", "group", "prompt"), rows, len(self))]

    @property
    def groups(self) -> list[str]:
        """The group of each item: items of one group are not independent."""
        return [item.group for item in self._items]

    @property
    def sha256(self) -> str:
        """Hex sha256 of the items: whatever decides what is asked and what is right."""
        return sha256_of([asdict(item) for item in self._items])

    @property
    def measure(self) -> Measure:
        """How what a model does with the items is measured."""
        return self.behaviour.measure or Answers(self.behaviour.judge)

    @property
    def two_sided(self) -> bool:
        """Whether every item has an answer for either side, so that the log-odds of the two exist."""
        return self.behaviour.answers and all(item.negative is not None for item in self._items)

    def judged_by(self, judge: Judge) -> Task:
        """The same items, answered and judged by another judge.

        A judge that has `sides`, `does` or `better` says so of its own positive side; one that has `for_task`
        is told what the task is about.
        Raises PairsError where the task is not judged.
        """
        measure = self.measure
        if not isinstance(measure, Answers):
            raise PairsError(f"{self.name}: what this task measures is not judged, so it takes no judge")
        if isinstance(judge, TaskJudge):
            judge = judge.for_task(self.behaviour)
        own = self.behaviour
        positive, negative = getattr(judge, "sides", (own.positive, own.negative))
        measure = replace(
            measure,
            judge=judge,
            better=getattr(judge, "better", measure.better),
            extra=tuple(getattr(judge, "metrics", ())),
        )
        behaviour = replace(
            own,
            judge=judge,
            measure=measure,
            does=getattr(judge, "does", own.does),
            positive=positive,
            negative=negative,
            answers=own.answers and getattr(judge, "answers", True),
        )
        return Task(self.name, self._items, behaviour)

    def as_texts(self) -> Task:
        """The same items as plain texts that end with `Answer:`, for models without a chat template."""
        items = (replace(item, content=as_text(item.content)) for item in self._items)
        return Task(self.name, items, self.behaviour)

    def judge(self, texts: Sequence[str]) -> list[Outcome]:
        """The side of each generated text: one text per item, in their order. Raises PairsError for more or
        fewer.
        """
        if len(texts) != len(self._items):
            given, items = count_of(len(texts), "text"), count_of(len(self._items), "item")
            raise PairsError(f"{self.name}: {given} for {items}: give the text of each item, in their order")
        return [verdict.outcome or "neither" for verdict in self.behaviour.judge.judge(self._items, texts)]
