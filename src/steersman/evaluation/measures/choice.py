"""Choice: which of an item's options the model holds likelier, by their log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.measures.measure import Measured, Metric
from steersman.ties import largest

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item

CHOICE = (
    Metric("accuracy", "likeliest option is right", "rate", "higher"),
    Metric("accuracy_per_character", "likeliest option by character is right", "rate", "higher"),
    Metric("probability", "probability of right options", "mean", "higher"),
)
TRUTHFUL = (
    Metric("mc1", "MC1: the best answer before every false one", "rate", "higher"),
    Metric("mc2", "MC2: probability of true answers", "mean", "higher"),
)


@dataclass(frozen=True)
class Choice:
    """The log-likelihood of each option after the prompt.

    `accuracy` is 1 where the likeliest option is right; `accuracy_per_character` the same by log-likelihood
    over the option's length (lm-eval's `acc_norm`); `probability` what the right options have of all options'
    probability. With `truthful` they are TruthfulQA's (Lin et al., arXiv 2109.07958): MC1 compares the best
    answer (place `facts["best"]`) with the false ones, MC2 is that share of probability.
    """

    truthful: bool = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return TRUTHFUL if self.truthful else CHOICE

    @property
    def sides(self) -> bool:
        return False

    def record(self) -> dict[str, Any]:
        return {"measure": "choice", "truthful": self.truthful}

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        found = condition.log_likelihoods([item.content for item in items], [item.options for item in items])
        return [
            self._measured(item, [one.total for one in likelihoods])
            for item, likelihoods in zip(items, found, strict=True)
        ]

    def _measured(self, item: Item, totals: Sequence[float]) -> Measured:
        if any(math.isnan(total) for total in totals):
            return Measured("", why="a log-likelihood is not a number")
        preferred = item.options[largest(range(len(totals)), totals.__getitem__)[0]]
        mass = probability_of(totals, item.correct)
        if self.truthful:
            best = [item.facts["best"]]
            others = [total for place, total in enumerate(totals) if place not in item.correct]
            right = chooses([totals[best[0]], *others], [0])
            return Measured(preferred, scores={"mc1": float(right), "mc2": mass})
        per_character = [total / len(text) for total, text in zip(totals, item.options, strict=True)]
        scores = {
            "accuracy": float(chooses(totals, item.correct)),
            "accuracy_per_character": float(chooses(per_character, item.correct)),
            "probability": mass,
        }
        return Measured(preferred, scores=scores)


def chooses(values: Sequence[float], correct: Sequence[int]) -> bool:
    """Whether one of the correct places has a larger value than every other place; a tie, up to rounding, is
    wrong.
    """
    return set(largest(range(len(values)), values.__getitem__)) <= set(correct)


def probability_of(totals: Sequence[float], correct: Sequence[int]) -> float:
    """Σ_correct exp(l) / Σ exp(l) of log-likelihoods l in nats; NaN where no option has any probability."""
    largest = max(totals)
    if largest == -math.inf:
        return math.nan
    weights = [math.exp(total - largest) for total in totals]
    return math.fsum(weights[place] for place in correct) / math.fsum(weights)
