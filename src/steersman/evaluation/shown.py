"""The items that a report shows: those on which arms differ first, side by side, changed words marked, and
how far each token was from what the unsteered model expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steersman.evaluation.comparison import BASE, changed_words
from steersman.evaluation.condition import Condition
from steersman.evaluation.measures.measure import Measured
from steersman.evaluation.tasks import Task


def shown_items(
    task: Task, noted: Mapping[str, Sequence[Measured]], conditions: Mapping[str, Condition], count: int
) -> list[dict[str, Any]]:
    """`count` items as JSON, those on which arms differ first, one a group before a second one of any."""
    places = _ranked(task, noted)[:count]
    shifts = {
        arm: _shifts(task, places, noted[arm], conditions[arm], conditions[BASE])
        for arm in noted
        if arm != BASE
    }
    return [
        {
            "id": task[place].id,
            "group": task[place].group,
            "kind": task[place].kind,
            "prompt": task[place].content,
            "answers": {
                arm: _answer(found[place], noted[BASE][place], shifts.get(arm, {}).get(place))
                for arm, found in noted.items()
            },
        }
        for place in places
    ]


def _answer(found: Measured, base: Measured, tokens: list[tuple[str, float]] | None) -> dict[str, Any]:
    return {
        "text": found.text,
        "outcome": found.outcome,
        "scores": {name: _number(value) for name, value in found.scores.items()},
        "why": found.why,
        "words": [[word.text, word.changed] for word in changed_words(base.text, found.text)],
        "tokens": None if tokens is None else [[piece, round(shift, 6)] for piece, shift in tokens],
    }


def _shifts(
    task: Task, places: Sequence[int], noted: Sequence[Measured], condition: Condition, base: Condition
) -> dict[int, list[tuple[str, float]]]:
    """Place → tokens with their divergence; empty where the texts are not the model's own words, or it reads
    them in other tokens than the base.
    """
    if not task.measure.sides or not same_tokens(condition, base):
        return {}
    contents, texts = [task[place].content for place in places], [noted[place].text for place in places]
    return dict(zip(places, condition.token_shifts(contents, texts, base), strict=True))


def same_tokens(first: Condition, second: Condition) -> bool:
    """Whether two conditions read and write the same tokens."""
    one, other = first.subject.tokenizer, second.subject.tokenizer
    return one is other or one.get_vocab() == other.get_vocab()


def _ranked(task: Task, noted: Mapping[str, Sequence[Measured]]) -> list[int]:
    def differing(place: int) -> int:
        found = [(arm[place].outcome, *sorted(arm[place].scores.items())) for arm in noted.values()]
        return len({str(one) for one in found})

    order = sorted(range(len(task)), key=lambda place: (-differing(place), place))
    firsts: list[int] = []
    others: list[int] = []
    seen: set[str] = set()
    for place in order:
        (others if task[place].group in seen else firsts).append(place)
        seen.add(task[place].group)
    return firsts + others


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
