"""What steering may cost: bounds as users write them, and what a plan costs on tasks that are to be kept.

A cost is kept where the upper end of its one-sided 95 % interval, by group, stays below its bound: that no
loss was seen among few items is no proof that there is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from steersman.errors import PairsError, PlanError
from steersman.evaluation.condition import Condition
from steersman.evaluation.measures.choice import chooses
from steersman.evaluation.prompts import encode_answer, encode_prompt
from steersman.evaluation.screening.texts import answers
from steersman.evaluation.statistics import Groups, clustered_mean, paired_difference
from steersman.evaluation.tasks import Task
from steersman.evaluation.tuning.degenerate import is_degenerate
from steersman.models.plan_rows import Floats, PlanRows
from steersman.models.scored_text import Text
from steersman.showing import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steersman.steering import Steering

ONE_SIDED = 0.90
"""Level of the two-sided interval whose upper end is the one-sided 95 % bound."""
LEAST_ITEMS = 200
"""Of a share: no loss among 32 items still allows one of 9 %."""
ANSWER_TOKENS = 16
"""Of the unsteered model's own answers, those along which KL is measured."""
COSTS = {
    "kl": "KL(steered ‖ unsteered) in nats a token, along the unsteered model's answers to kept prompts",
    "lost": "share of the kept tasks' answers that were right and are not, less those that became right",
    "degenerate": "share of answers to kept prompts that repeat themselves or change language, unlike before",
}
EXAMPLE = '--cost "kl <= 0.3"'


@dataclass(frozen=True)
class CostBound:
    """At most so much of a cost."""

    name: str
    most: float

    def __str__(self) -> str:
        return f"{self.name} <= {self.most:g}"


@dataclass(frozen=True)
class Cost:
    """What was found: its size, the upper end of its one-sided 95 % interval, over how many items."""

    value: float
    upper: float
    items: int
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; None where there is no interval."""
        upper = None if math.isnan(self.upper) else self.upper
        return {"value": self.value, "upper": upper, "items": self.items, "kept": self.kept}


def read_bounds(given: Sequence[str]) -> tuple[CostBound, ...]:
    """Bounds as they are written: "kl <= 0.3". Raises PlanError for what is none, or one given twice."""
    found: list[CostBound] = []
    for text in given:
        match = re.fullmatch(r"\s*([a-z]+)\s*<=?\s*([-+.0-9eE]+)\s*", text if isinstance(text, str) else "")
        try:
            most = float(match[2]) if match else math.nan
        except ValueError:
            most = math.nan
        if match is None or not 0 <= most < math.inf or match[1] not in COSTS:
            raise PlanError(
                f"--cost {text!r}: right is NAME <= NUMBER, such as {EXAMPLE}, with NAME one of "
                f"{', '.join(COSTS)}, and a number from 0"
            )
        if any(one.name == match[1] for one in found):
            raise PlanError(f"--cost {match[1]} is given twice; right is once")
        found.append(CostBound(match[1], most))
    return tuple(found)


class Kept:
    """Tasks that steering is to leave as they are, on one half of their items: what a plan costs there.

    Args:
        tasks: The tasks.
        bounds: What may be lost.
        condition: The unsteered model, whose answers KL is measured along.

    Raises:
        PairsError: too few items for a share, or a task without right answers where those are counted.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        bounds: Sequence[CostBound],
        condition: Condition,
    ) -> None:
        self.tasks = tasks
        self.bounds = tuple(sorted(bounds, key=lambda bound: list(COSTS).index(bound.name)))
        self.contents = [item.content for task in tasks for item in task]
        self.groups: Groups = [(task.name, group) for task in tasks for group in task.groups]
        self._base_texts: list[str] | None = None
        self._condition = condition
        self._texts: list[Text] = []
        self._answers: dict[int, list[Text]] = {}
        names = {bound.name for bound in bounds}
        if names & {"lost", "degenerate"} and len(self.contents) < LEAST_ITEMS:
            raise PairsError(
                f"{', '.join(task.name for task in tasks)}: {count_of(len(self.contents), 'kept item')} in "
                f"this half, and a share's bound needs {LEAST_ITEMS} at least; keep more tasks (--keep), or "
                "bound kl alone"
            )
        if "lost" in names:
            for task in tasks:
                _require_right_answers(task)

    @property
    def base_texts(self) -> list[str]:
        """What the unsteered model answers to the kept prompts."""
        if self._base_texts is None:
            self._base_texts = self._condition.answers(self.contents, max_new_tokens=ANSWER_TOKENS)
        return self._base_texts

    @base_texts.setter
    def base_texts(self, texts: list[str]) -> None:
        self._base_texts = texts

    def measure(self, rows: PlanRows, plan: Steering) -> dict[str, Cost]:
        """What a plan costs by what can be read off without generating.

        Of KL it looks at a quarter of the items first: what is above its bound there by the lower end of the
        interval too is not looked at further. What right answers are lost is read where KL is kept.
        """
        found: dict[str, Cost] = {}
        for bound in self.bounds:
            if bound.name == "kl":
                found["kl"] = self._kl(rows, plan, bound.most)
            elif bound.name == "lost" and all(cost.kept for cost in found.values()):
                found["lost"] = self._lost(rows, plan, bound.most)
        return found

    def degenerate(self, steered: Sequence[str], most: float) -> Cost:
        """The cost of answers to the kept prompts, beside the unsteered model's."""
        before = [False] * len(steered)
        after = [
            is_degenerate(text, instead_of=base) for text, base in zip(steered, self.base_texts, strict=True)
        ]
        return _share(before, after, self.groups, most)

    # ---------------------------------------------------------------- inside

    def _kl(self, rows: PlanRows, plan: Steering, most: float) -> Cost:
        if not self._texts:
            tokenizer = self._condition.subject.tokenizer
            self._texts = [
                _along(tokenizer, self._condition.prompt(content), text)
                for content, text in zip(self.contents, self.base_texts, strict=True)
            ]
        quarter = self._quarter
        values = np.zeros(len(self._texts))
        values[quarter] = rows.divergences([self._texts[n] for n in quarter], [plan])[0]
        first = clustered_mean(values[quarter], [self.groups[n] for n in quarter], level=ONE_SIDED)
        if first.low > most:
            return Cost(first.mean, first.high, first.count, False)
        rest = [n for n in range(len(values)) if n not in {*quarter}]
        if rest:
            values[rest] = rows.divergences([self._texts[n] for n in rest], [plan])[0]
        found = clustered_mean(values, self.groups, level=ONE_SIDED)
        return Cost(found.mean, found.high, found.count, found.high <= most)

    @property
    def _quarter(self) -> list[int]:
        """Places of every fourth item, of two at least."""
        return list(range(0, len(self.contents), 4 if len(self.contents) >= 8 else 1))

    def _lost(self, rows: PlanRows, plan: Steering, most: float) -> Cost:
        right = [self._right(rows, number, [None, plan]) for number in range(len(self.tasks))]
        before, after = np.concatenate(right, axis=1)
        if not before.any():
            names = ", ".join(task.name for task in self.tasks)
            raise PairsError(
                f"{names}: the unsteered model answers none of {count_of(len(before), 'kept item')} right, "
                "so none can be lost; keep a task that it knows (--keep), or bound kl alone"
            )
        return _share(1 - before, 1 - after, self.groups, most)

    def _right(self, rows: PlanRows, number: int, plans: Sequence[Steering | None]) -> Floats:
        """Which items of a task are answered right, 0 or 1 [plans, items]: the likeliest option is right,
        else the right answer is what the model says, token by token.
        """
        task, tokenizer = self.tasks[number], self._condition.subject.tokenizer
        chosen = all(item.options for item in task)
        if number not in self._answers:  # the same texts again, of which the unsteered model's part is known
            self._answers[number] = (
                options_of(task, tokenizer) if chosen else [*answers(task, tokenizer).texts]
            )
        texts = self._answers[number]
        if not chosen:
            return rows.greedy(texts, plans)
        totals = rows.scores(texts, plans)
        found = np.zeros((len(plans), len(task)))
        for place, (item, own) in enumerate(zip(task, places_of(texts, len(task)), strict=True)):
            found[:, place] = [chooses(of_plan[own].tolist(), item.correct) for of_plan in totals]
        return found


def _share(before: ArrayLike, after: ArrayLike, groups: Groups, most: float) -> Cost:
    """How much oftener something holds after than before; its bound by Tango's score interval, where nothing
    changed by the exact one: 1 − .05^(1/n), 9 % of 32.
    """
    found = paired_difference(before, after, groups, level=ONE_SIDED)
    upper = found.high
    if not (found.only_first or found.only_second):
        upper = 1 - float(((1 - ONE_SIDED) / 2) ** (1 / found.effective_count))
    return Cost(found.difference, upper, found.count, upper <= most)


def places_of(texts: Sequence[Text], items: int) -> list[list[int]]:
    """Which texts belong to each item."""
    found: list[list[int]] = [[] for _ in range(items)]
    for place, text in enumerate(texts):
        found[text.item].append(place)
    return found


def options_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Each option of each item as a text of its own, whose score is its log p."""
    found = []
    for number, item in enumerate(task):
        for option in item.options:
            found.append(forced(tokenizer, number, item.content, option))
    return found


def forced(tokenizer: PreTrainedTokenizerBase, number: int, content: Any, answer: str) -> Text:
    """An answer after its prompt, every token of it scored."""
    ids, shared = encode_answer(tokenizer, content, answer)
    scored = tuple((place - 1, ids[place], 1.0) for place in range(shared, len(ids)))
    return Text(number, ids[:-1], shared, scored)


def _along(tokenizer: PreTrainedTokenizerBase, content: Any, answer: str) -> Text:
    """A prompt with what the model answered: every place that expects a token of it; of no answer, the first
    place alone.
    """
    return forced(tokenizer, 0, content, answer) if answer.strip() else prompt_alone(tokenizer, 0, content)


def prompt_alone(tokenizer: PreTrainedTokenizerBase, number: int, content: Any) -> Text:
    """A prompt, read at its last place."""
    ids = encode_prompt(tokenizer, content)
    return Text(number, ids, len(ids), ((len(ids) - 1, 0, 1.0),))


def _require_right_answers(task: Task) -> None:
    for item in task:
        # What a judge is told (a pattern, say) is no answer.
        if not item.options and not (task.behaviour.answers and item.positive.strip()):
            raise PairsError(
                f"{task.name}: {item.id} has neither options nor a right answer, so none can be lost; keep "
                "a task with right answers, or bound kl alone"
            )
