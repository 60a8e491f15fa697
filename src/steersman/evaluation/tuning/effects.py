"""What steering is for: the log-odds of a task's two sides, or judged answers where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.measures.measure import Measured
from steersman.evaluation.screening.items import told_apart
from steersman.evaluation.screening.texts import Reading, by_item, preferences, require_room
from steersman.evaluation.tasks import Task
from steersman.evaluation.tuning.costs import options_of, places_of
from steersman.models.plan_rows import Floats, PlanRows

if TYPE_CHECKING:
    from steersman.steering import Steering


class Effect(Protocol):
    """A number an item, the larger the more it is on the positive side."""

    task: Task
    in_words: str

    def values(self, plans: Sequence[Steering | None]) -> Floats:
        """Of every item under each plan: [plans, items]."""
        ...


class LogOdds:
    """d = log p(positive) − log p(negative) of each item, in nats: at the first token where the answers
    differ, or of whole answers; with options, of the right ones against all others.
    """

    def __init__(self, rows: PlanRows, task: Task, *, whole: bool) -> None:
        self._rows = rows
        self._options = not task.two_sided
        self.task = task if self._options else told_apart(task, rows.tokenizer)
        self._reading = None if self._options else preferences(self.task, rows.tokenizer, whole=whole)
        self._texts = options_of(task, rows.tokenizer) if self._reading is None else self._reading.texts
        require_room(Reading(task.name, tuple(self._texts), tuple(task.groups)), rows.model)
        self.in_words = (
            "log-odds of the right options"
            if self._options
            else (
                "log-odds of the two answers, whole" if whole else "log-odds of the two answers' first tokens"
            )
        )

    @property
    def feeds_back(self) -> bool:
        """Whether an item has tokens of an answer before those that are scored: what `generated` steers."""
        return any(len(text.ids) > text.prompt_length for text in self._texts)

    def values(self, plans: Sequence[Steering | None]) -> Floats:
        scores = self._rows.scores(self._texts, plans)
        if self._reading is not None:
            return by_item(self._reading, scores)
        found = np.zeros((len(plans), len(self.task)))
        for number, places in enumerate(places_of(self._texts, len(self.task))):
            item, own = self.task[number], scores[:, places]
            right = np.isin(np.arange(own.shape[1]), item.correct)
            found[:, number] = np.logaddexp.reduce(own[:, right], axis=1) - np.logaddexp.reduce(
                own[:, ~right], axis=1
            )
        return found


class Answered:
    """What the task's own measure makes of what the model does with each item: 1 on the positive side, else
    0; of a measure without sides its first metric.
    """

    def __init__(self, subject: Subject, task: Task, *, seed: int) -> None:
        self.task = task
        self.in_words = (
            f"answers: {task.behaviour.does}" if task.measure.sides else task.measure.metrics[0].title
        )
        self._subject = subject
        self._seed = seed
        self.texts: list[list[str]] = []
        """What was said to each item, plan by plan, the last time."""

    def values(self, plans: Sequence[Steering | None]) -> Floats:
        found = np.zeros((len(plans), len(self.task)))
        self.texts = []
        for number, plan in enumerate(plans):
            condition = self._subject.condition(Arm("tuned", plan), seed=self._seed)
            measured = self.task.measure.run(condition, list(self.task))
            found[number] = [self._value(one) for one in measured]
            self.texts.append([one.text for one in measured])
        return found

    def _value(self, one: Measured) -> float:
        if self.task.measure.sides:
            return float(one.outcome == "positive")
        value = one.scores.get(self.task.measure.metrics[0].name, 0.0)
        return 0.0 if value != value else float(value)


def has_log_odds(task: Task) -> bool:
    """Whether every item has answers for both sides, or options of which some are right."""
    return task.two_sided or all(0 < len(item.correct) < len(item.options) for item in task)
