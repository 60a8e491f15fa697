"""The items that a report shows: those on which arms differ first, side by side, changed words marked, and
how far each token was from what the unsteered model expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from steersman.evaluation.comparison import BASE, changed_words
from steersman.evaluation.condition import Condition
from steersman.evaluation.controlling import Once
from steersman.evaluation.measures.measure import Measured
from steersman.evaluation.result import number
from steersman.evaluation.run_store import key_of
from steersman.evaluation.tasks import Task
from steersman.models.reading import evaluating
from steersman.ties import ranks


def shown_items(
    once: Once,
    task: Task,
    noted: Mapping[str, Sequence[Measured]],
    conditions: Mapping[str, Condition],
    count: int,
) -> list[dict[str, Any]]:
    """`count` items as JSON, those on which arms differ first, one a group before a second one of any.

    Tokens are compared with what the unsteered model expected for the plain arms, not for cells.
    """
    places = _ranked(task, noted)[:count]
    base = conditions[BASE]
    shifts = {
        arm: once(
            key_of("shown", task.name, arm),
            partial(_shifts, task, places, noted[arm], condition, base),
        )
        or {}
        for arm, condition in conditions.items()
        if arm != BASE and condition.arm.kind != "cell"
    }
    return [
        {
            "id": task[place].id,
            "group": task[place].group,
            "kind": task[place].kind,
            "prompt": task[place].content,
            "answers": {
                arm: _answer(found[place], noted[BASE][place], shifts.get(arm, {}).get(str(place)))
                for arm, found in noted.items()
            },
        }
        for place in places
    ]


def _answer(found: Measured, base: Measured, tokens: list[list[Any]] | None) -> dict[str, Any]:
    return {
        "text": found.text,
        "outcome": found.outcome,
        "scores": {name: number(value) for name, value in found.scores.items()},
        "why": found.why,
        "words": [[word.text, word.changed] for word in changed_words(base.text, found.text)],
        "tokens": tokens,
    }


def _shifts(
    task: Task, places: Sequence[int], noted: Sequence[Measured], condition: Condition, base: Condition
) -> dict[str, Any]:
    """Place → tokens with their divergence; empty where the texts are not the model's own words, or it reads
    them in other tokens than the base, or divergences cannot be had.
    """
    if not task.measure.sides or not same_tokens(condition, base) or not condition.tells_divergences:
        return {}
    contents, texts = [task[place].content for place in places], [noted[place].text for place in places]
    with evaluating(condition.subject.model):
        found = condition.token_shifts(contents, texts, base)
    return {
        str(place): [[piece, round(shift, 6)] for piece, shift in tokens]
        for place, tokens in zip(places, found, strict=True)
    }


def same_tokens(first: Condition, second: Condition) -> bool:
    """Whether two conditions read and write the same tokens."""
    one, other = first.subject.tokenizer, second.subject.tokenizer
    return one is other or one.get_vocab() == other.get_vocab()


def _ranked(task: Task, noted: Mapping[str, Sequence[Measured]]) -> list[int]:
    def differing(place: int) -> int:
        found = [arm[place] for arm in noted.values()]
        names = sorted({name for one in found for name in one.scores})
        scores = [ranks([one.scores.get(name, np.nan) for one in found], absolute=1e-6) for name in names]
        return len({(one.outcome, *(int(of[arm]) for of in scores)) for arm, one in enumerate(found)})

    order = sorted(range(len(task)), key=lambda place: (-differing(place), place))
    firsts: list[int] = []
    others: list[int] = []
    seen: set[str] = set()
    for place in order:
        (others if task[place].group in seen else firsts).append(place)
        seen.add(task[place].group)
    return firsts + others
