"""The drawn controls of an evaluation: what matched plans do on a task, beside what the plan does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.errors import PairsError
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.comparison import BASE
from steersman.evaluation.condition import Condition
from steersman.evaluation.planning import Arms
from steersman.evaluation.prompts import Fork, encode_fork
from steersman.evaluation.random_arm import matched, random_plans_like
from steersman.evaluation.result import PREFERENCE
from steersman.evaluation.run_store import key_of
from steersman.evaluation.statistics import clustered_mean, holm, mean_difference, random_control
from steersman.evaluation.summary import values_of
from steersman.evaluation.tasks import Task
from steersman.evaluation.vector_controls import ShuffledConcepts
from steersman.steering import Steering

Once = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any] | None]
"""Runs a piece of work under a key, unless it was done before; None where nothing is to be run."""


def preferences(
    once: Once, condition: Callable[[Arm], Condition], task: Task, arms: Sequence[Arm]
) -> dict[str, dict[str, Any]] | None:
    """Arm → mean d with its interval, and its change against the base on the same items; None where an item
    has not two answers that can be compared.
    """
    first = condition(arms[0])
    if _forks(task, first) is None:
        return None
    found: dict[str, list[float]] = {}
    for arm in arms:
        own = condition(arm)
        if own.subject is not first.subject or (own.steering is not None and not _begins(own.steering)):
            continue

        def measured(own: Condition = own) -> dict[str, Any]:
            forks = _forks(task, own)
            values = None if forks is None else own.subject.preference(forks, own.steering).tolist()
            return {"values": values}

        done = once(key_of("d", task.name, arm.name), measured)
        if done is not None and done["values"] is not None:
            found[arm.name] = done["values"]
    return _with_changes(found, task.groups)


def _with_changes(found: Mapping[str, Sequence[float]], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arm → mean of d, and the paired change against the base's with its interval, p adjusted over arms."""
    changes = {
        arm: mean_difference(found[BASE], values, groups).to_json()
        for arm, values in found.items()
        if arm != BASE and BASE in found
    }
    for change, p in zip(changes.values(), holm([change["p"] for change in changes.values()]), strict=True):
        change["p_holm"] = p
    return {
        arm: {
            **clustered_mean(values, groups).to_json(),
            **({"change": changes[arm]} if arm in changes else {}),
        }
        for arm, values in found.items()
    }


def random_controls(
    once: Once,
    subject: Subject,
    task: Task,
    arms: Arms,
    steerings: Sequence[str],
    *,
    draws: int,
    items: int,
    seed: int,
    shuffled: ShuffledConcepts,
) -> list[dict[str, Any]]:
    """For each plan: its effect on the first `items` of a task among those of `draws` random plans alike; and
    where its vectors are of known concepts, among those of as many label-shuffled ones.

    The effect is the plan's value minus that of its reverse, or of the base where there is none: mean d where
    items have two answers that can be compared (and the plan acts before the first token of an answer), the
    task's first metric otherwise. p is two-sided: nothing says beforehand which way a plan is to move them.
    """
    effects: dict[bool, _Effect] = {}
    found = []
    for name in steerings:
        first = all(_begins(plan) for plan in both_ways(arms, name))
        if first not in effects:
            effects[first] = _Effect(subject, task[:items], first_token=first)
        for family, count in families(arms, name, draws, shuffled).items():
            of_it = shuffled if family == "shuffled" else None
            found.append(_control(once, effects[first], arms, name, family, of_it, draws=count, seed=seed))
    return [control for control in found if control is not None]


def families(arms: Arms, name: str, draws: int, shuffled: ShuffledConcepts) -> dict[str, int]:
    """Family of controls → how many are drawn beside a plan."""
    kept = min(draws, shuffled.count_for(*both_ways(arms, name)))
    return {"random": draws, **({"shuffled": kept} if kept else {})}


def _control(
    once: Once,
    effect: _Effect,
    arms: Arms,
    name: str,
    family: str,
    shuffled: ShuffledConcepts | None,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any] | None:
    """One plan among those of a family; None where no item has the number."""
    toward, back, *_ = [*both_ways(arms, name), None]
    plans = _Lazy(
        lambda: random_plans_like(
            effect.subject, effect.task, toward, back, draws=draws, seed=seed, shuffled=shuffled
        )
    )

    def drawn(number: int) -> dict[str, Any]:
        plan = plans.get()[number]
        return {"value": effect.of(plan.toward, plan.back)}

    def key(*draw: int | str) -> str:
        return key_of("control", effect.task.name, name, *draw)

    itself = once(key("itself"), lambda: {"value": effect.of(toward, back)})
    done = [once(key(family, number), partial(drawn, number)) for number in range(draws)]
    values = [one["value"] for one in done if one is not None and one["value"] is not None]
    observed = None if itself is None else itself["value"]
    if observed is None or not values:
        return None
    return {
        "steering": name,
        "family": family,
        "arms": [name, arms.reversed_of.get(name)],
        "measure": effect.name,
        "items": len(effect.task),
        "matched": matched(effect.subject, toward, shuffled=shuffled is not None),
        **random_control(observed, values, two_sided=True).to_json(),
    }


class _Effect:
    """What a plan does on items, in one number."""

    def __init__(self, subject: Subject, task: Task, *, first_token: bool) -> None:
        self.subject = subject
        self.task = task
        self._base = subject.condition(Arm(BASE, None))
        self._forks = _forks(task, self._base) if first_token else None
        self._metric = task.measure.metrics[0]
        self._unsteered: float | None = None

    @property
    def name(self) -> str:
        """What is measured."""
        return self._metric.name if self._forks is None else PREFERENCE

    def of(self, toward: Steering, back: Steering | None) -> float | None:
        """None where no item has the number."""
        found = self._value(toward) - (self._base_value() if back is None else self._value(back))
        return None if math.isnan(found) else found

    def _base_value(self) -> float:
        if self._unsteered is None:
            self._unsteered = self._value(None)
        return self._unsteered

    def _value(self, plan: Steering | None) -> float:
        if self._forks is not None:
            return float(self.subject.preference(self._forks, plan).mean())
        condition = self.subject.condition(Arm("random", plan))
        values: list[NDArray[np.float64]] = []
        size = self.subject.batch_size
        for start in range(0, len(self.task), size):
            noted = self.task.measure.run(condition, list(self.task[start : start + size]))
            values.append(values_of(noted, self._metric))
        numbers = np.concatenate(values)
        numbers = numbers[np.isfinite(numbers)]
        return float(numbers.mean()) if len(numbers) else math.nan


class _Lazy:
    """Plans that are drawn when the first one is needed."""

    def __init__(self, draw: Callable[[], list[Any]]) -> None:
        self._draw = draw
        self._plans: list[Any] | None = None

    def get(self) -> list[Any]:
        if self._plans is None:
            self._plans = self._draw()
        return self._plans


def both_ways(arms: Arms, name: str) -> list[Steering]:
    """A plan, and that of the other direction if there is one."""
    back = arms.reversed_of.get(name)
    return [_plan(arms.named(arm)) for arm in (name, back) if arm is not None]


def _begins(plan: Steering) -> bool:
    """Whether a plan acts on what decides the first token of an answer."""
    return not plan.edits or any(edit.scope != "generated" for edit in plan.edits)


def _plan(arm: Arm) -> Steering:
    if arm.steering is None:
        raise ValueError(f"the arm {arm.name} has no plan")
    return arm.steering


def _forks(task: Task, condition: Condition) -> list[Fork] | None:
    if not task.two_sided or not task.measure.sides:
        return None
    tokenizer = condition.subject.tokenizer
    try:
        return [
            encode_fork(tokenizer, replace(item, content=condition.prompt(item.content))) for item in task
        ]
    except PairsError:  # answers that begin the same, and one of them ends there
        return None
