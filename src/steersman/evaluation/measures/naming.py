"""Naming: whether the model says the right one of several words, and holds it likeliest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.measures.choice import chooses
from steersman.evaluation.measures.measure import Measured, Metric
from steersman.ties import largest

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class Naming:
    """ConTrans's two accuracies (arXiv 2405.13578) of the option at `correct`.

    Logit accuracy: it is the likeliest option, by whole log-probabilities. Token accuracy: it is
    what the model says by itself, each of its tokens the likeliest of the vocabulary.
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("logit_accuracy", "the word is the likeliest of the words", "rate", "higher"),
            Metric("token_accuracy", "the word is what the model says", "rate", "higher"),
        )

    @property
    def sides(self) -> bool:
        return False

    def record(self) -> dict[str, Any]:
        return {"measure": "naming"}

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        measured = []
        found = condition.log_likelihoods([item.content for item in items], [item.options for item in items])
        for item, likelihoods in zip(items, found, strict=True):
            totals = [one.total for one in likelihoods]
            if any(math.isnan(total) for total in totals):
                measured.append(Measured("", why="a log-likelihood is not a number"))
                continue
            scores = {
                "logit_accuracy": float(chooses(totals, item.correct)),
                "token_accuracy": float(likelihoods[item.correct[0]].greedy),
            }
            measured.append(
                Measured(item.options[largest(range(len(totals)), totals.__getitem__)[0]], scores=scores)
            )
        return measured
