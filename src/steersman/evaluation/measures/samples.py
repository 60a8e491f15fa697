"""Samples: the model answers each prompt several times at a temperature; how answers differ is noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.judges.phrases import words_of
from steersman.evaluation.measures.diversity import distinct, vendi
from steersman.evaluation.measures.measure import Measured, Metric

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class Samples:
    """`count` answers an item; the same random numbers under every arm."""

    count: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = 64

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("vendi", f"Vendi score: different answers of {self.count}", "mean", "higher"),
            Metric("distinct_1", "distinct words over all words", "mean", "higher"),
            Metric("distinct_2", "distinct pairs of words over all pairs", "mean", "higher"),
        )

    @property
    def sides(self) -> bool:
        return False

    def record(self) -> dict[str, Any]:
        return {
            "measure": "samples",
            "count": self.count,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
        }

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        sampled = condition.samples(
            [item.content for item in items],
            self.count,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
        )
        return [self._measured(texts) for texts in sampled]

    def _measured(self, texts: Sequence[str]) -> Measured:
        words = [words_of(text) for text in texts]
        scores = {"vendi": vendi(words), "distinct_1": distinct(words, 1), "distinct_2": distinct(words, 2)}
        return Measured(texts[0], scores=scores, more=tuple(texts[1:]))
