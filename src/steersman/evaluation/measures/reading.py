"""Reading: how the model reads a plain text, and how far that is from the unsteered model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steersman.evaluation.measures.measure import Measured, Metric

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class ReadTexts:
    """Mean −log p of a text's tokens in nats (exp of it is the perplexity), and mean KL(arm ‖ unsteered)."""

    as_it_is = True
    """Texts are read as they are, whatever an arm's instruction or template."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("nll", "negative log-likelihood per token (nats)", "mean", "lower"),
            Metric("kl", "KL to the unsteered model per token (nats)", "mean", "lower"),
        )

    @property
    def sides(self) -> bool:
        return False

    def record(self) -> dict[str, Any]:
        return {"measure": "readings"}

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        found = []
        for reading in condition.readings([str(item.content) for item in items]):
            scores = {"nll": reading.negative_log_likelihood / reading.tokens}
            if reading.divergence is not None:
                scores["kl"] = reading.divergence
            found.append(Measured("", scores=scores))
        return found
