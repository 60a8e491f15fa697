"""Running an evaluation: every task under every arm, batch by batch, each finished batch kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm import tqdm

from steersman.errors import ArtifactError, PairsError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import BASE
from steersman.evaluation.condition import Condition
from steersman.evaluation.measures.measure import Measured
from steersman.evaluation.planning import Arms
from steersman.evaluation.run_store import Entry, RunStore, append, key_of, read_entries
from steersman.evaluation.tasks import Task
from steersman.models.reading import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True)
class Part:
    """A task with its role (`effect`: what is steered for; `side`: what it may cost) and its arms."""

    task: Task
    role: str
    arms: tuple[Arm, ...]


class Runner:
    """Puts items to models, once each.

    Args:
        subject: The model that is steered.
        parts: What is asked.
        arms: All arms.
        others: Name → what opens another model that is asked; opened when it is first needed.
        store: Keeps finished batches.
        cache: A file that holds unsteered batches of other evaluations alike, by task; None for none.
        seed: Of every sample.
    """

    def __init__(
        self,
        subject: Subject,
        parts: Sequence[Part],
        arms: Arms,
        others: Mapping[str, Callable[[], Opened]],
        store: RunStore,
        cache: Mapping[str, Path],
        *,
        seed: int,
        progress: bool,
    ) -> None:
        self.subject = subject
        self.parts = parts
        self.conditions: dict[str, Condition] = {}
        self.ran = 0
        """Batches that were run now, not found."""
        self._arms = arms
        self._others = others
        self._subjects: dict[str, Subject] = {}
        self._store = store
        self._cached = {name: (path, read_entries(path)) for name, path in cache.items()}
        self._seed = seed
        self._progress = progress
        self._bar: Any = None
        self._batches = {part.task.name: self._in_batches(part.task) for part in parts}
        self._same = {part.task.name: _alike(part) for part in parts}
        self._places: dict[str, list[int]] = {}

    def run(self, more: int = 0) -> dict[str, dict[str, list[Measured]]]:
        """Task → arm → what was noted of each item.

        Args:
            more: Steps that come afterwards and belong on the same bar.
        """
        total = sum(len(self._batches[part.task.name]) * len(part.arms) for part in self.parts)
        silent = not self._progress or self.only_reads
        self._bar = tqdm(total=total + more, desc="evaluate", unit="batch", delay=1, disable=silent)
        return {part.task.name: self._run_part(part) for part in self.parts}

    def done(self, part: Part) -> Task | None:
        """The task with the items that are finished under every arm; None where none are."""
        places = self._places[part.task.name]
        if len(places) == len(part.task):
            return part.task
        items = [part.task[place] for place in places]
        return Task(part.task.name, items, part.task.behaviour) if items else None

    @property
    def only_reads(self) -> bool:
        """Whether nothing is run: what is finished is reported."""
        return self._store.finished

    def once(self, key: str, work: Callable[[], Entry]) -> Entry | None:
        """What some further work gave, done now or found; None where it is only to be found, and is not."""
        found = self._store.get(key)
        if found is None and self.only_reads:
            return None
        if found is None:
            self.ran += 1
            found = self._store.put(key, work())
        self._bar.update(1)
        return found

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def condition(self, arm: Arm) -> Condition:
        """The model under an arm."""
        if arm.name not in self.conditions:
            self.conditions[arm.name] = self._subject_of(arm).condition(arm, seed=self._seed)
        return self.conditions[arm.name]

    def receipt(self, arm: Arm) -> dict[str, int]:
        """Site → tokens that were steered there, over all tasks, whenever they were run."""
        total: dict[str, int] = {}
        for part in self.parts:
            same = self._same[part.task.name].get(arm.name)
            for number in range(len(self._batches[part.task.name]) if same else 0):
                entry = self._store.get(_key(part.task, cast(Arm, same), number)) or {}
                for site, tokens in entry.get("receipt", {}).items():
                    total[site] = total.get(site, 0) + tokens
        return dict(sorted(total.items(), key=_by_layer))

    # ---------------------------------------------------------------- inside

    def _run_part(self, part: Part) -> dict[str, list[Measured]]:
        """Arm → what was noted of each item. Batch by batch under all arms: what an unfinished run has can be
        compared, and arms that need the unsteered model's numbers share them.
        """
        task = part.task
        found: dict[str, dict[int, Measured]] = {arm.name: {} for arm in part.arms}
        same, batches = self._same[task.name], self._batches[task.name]
        # Not by length: what an unfinished run has are some of all items, not the shortest ones.
        for number in np.random.default_rng(self._seed).permutation(len(batches)).tolist():
            places = batches[number]
            if self.only_reads and not all(self._has(task, same[arm.name], number) for arm in part.arms):
                continue
            for arm in part.arms:
                entry = self._entry(task, same[arm.name], number, places)
                found[arm.name] |= dict(zip(places, map(_measured, entry["items"]), strict=True))
                self._bar.update(1)
        for subject in (self.subject, *self._subjects.values()):
            subject.unsteered = None
        self._places[task.name] = sorted(found[part.arms[0].name])
        return {name: [noted[place] for place in sorted(noted)] for name, noted in found.items()}

    def _has(self, task: Task, arm: Arm, number: int) -> bool:
        return _fits(self._store.get(_key(task, arm, number)), self._batches[task.name][number])

    def _entry(self, task: Task, arm: Arm, number: int, places: Sequence[int]) -> Entry:
        key = _key(task, arm, number)
        if (found := self._store.get(key)) is not None and _fits(found, places):
            return found
        cached = self._cached.get(task.name) if arm.name == BASE else None
        if cached is not None and _fits(found := cached[1].get(str(number)), places):
            return self._store.put(key, cast(Entry, found))
        entry = self._store.put(key, self._measure(task, arm, places))
        if cached is not None:
            try:
                append(cached[0], str(number), entry)
            except ArtifactError as error:
                raise ArtifactError(f"{error}; --no-cache (in Python cache=None) does without") from None
        return entry

    def _measure(self, task: Task, arm: Arm, places: Sequence[int]) -> Entry:
        condition = self.condition(arm)
        condition.receipt = {}
        items = [task[place] for place in places]
        with evaluating(condition.subject.model):
            try:
                noted = task.measure.run(condition, items)
            except PairsError as error:
                raise PairsError(f"{task.name}: {error}") from error
        self.ran += 1
        return {"items": [_plain(one) for one in noted], "receipt": condition.receipt}

    def _subject_of(self, arm: Arm) -> Subject:
        if arm.other is None:
            return self.subject
        if arm.other not in self._subjects:
            model, tokenizer = self._others[arm.other]()
            first = self.subject
            self._subjects[arm.other] = Subject(
                model, tokenizer, batch_size=first.batch_size, max_new_tokens=first.max_new_tokens
            )
        return self._subjects[arm.other]

    def _in_batches(self, task: Task) -> list[list[int]]:
        """Places of items of like length: the same batches whatever the arm, and after a kill."""
        lengths = [len(self.subject.encoded(item.content)) for item in task]
        order = sorted(range(len(task)), key=lambda place: (lengths[place], place))
        size = self.subject.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]


@contextmanager
def closing(runner: Runner) -> Iterator[Runner]:
    """The runner, without its bar in the end."""
    try:
        yield runner
    finally:
        runner.close()


def _alike(part: Part) -> dict[str, Arm]:
    """Arm → the first one that puts the items to the same model in the same way: it is run for both."""
    reads = getattr(part.task.measure, "as_it_is", False)
    firsts: dict[object, Arm] = {}
    found = {}
    for arm in part.arms:
        plan = arm.steering if arm.steering is not None and arm.steering.edits else None
        around = None if reads else (arm.system, arm.template)
        found[arm.name] = firsts.setdefault((arm.other, plan, around), arm)
    return found


def _key(task: Task, arm: Arm, number: int) -> str:
    return key_of("batch", task.name, arm.name, number)


def _fits(entry: Entry | None, places: Sequence[int]) -> bool:
    """Whether a kept batch holds as many items as are asked; one that does not is run again."""
    return entry is not None and len(entry.get("items", ())) == len(places)


def _plain(one: Measured) -> list[Any]:
    scores = {name: None if math.isnan(value) else float(value) for name, value in one.scores.items()}
    return [one.text, one.outcome, scores, one.why, list(one.more)]


def _measured(values: Sequence[Any]) -> Measured:
    text, outcome, scores, why, more = values
    numbers = {name: math.nan if value is None else value for name, value in scores.items()}
    return Measured(text, outcome, numbers, why, tuple(more))


def _by_layer(entry: tuple[str, int]) -> tuple[str, int]:
    point, _, layer = entry[0].partition(":")
    return point, int(layer)
