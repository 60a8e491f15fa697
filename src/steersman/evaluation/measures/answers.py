"""Answers: the model generates greedily, a judge says which side the text is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steersman.evaluation.judges.verdict import Judge
from steersman.evaluation.measures.measure import Measured, Metric

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class Answers:
    """One greedy answer an item.

    Args:
        judge: Says which side a text is on.
        max_new_tokens: At most so many; None: what the evaluation says.
        better: Whether the positive side is what one wants ("lower": over-refusal).
        extra: Further metrics that the judge gives scores for.
    """

    judge: Judge
    max_new_tokens: int | None = None
    better: Literal["higher", "lower"] | None = "higher"
    extra: tuple[Metric, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("positive", "positive side", "rate", self.better), *self.extra)

    @property
    def sides(self) -> bool:
        return True

    def record(self) -> dict[str, Any]:
        settings = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return {"measure": "answers", **settings, "judge": self.judge.record()}

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        texts = condition.answers([item.content for item in items], max_new_tokens=self.max_new_tokens)
        return [
            Measured(text, verdict.outcome, dict(verdict.scores), verdict.why)
            for text, verdict in zip(texts, self.judge.judge(items, texts), strict=True)
        ]
