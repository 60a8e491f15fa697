"""What a measure is: how a batch of items is put to a model under one arm, and what is noted of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from steersman.evaluation.judges.verdict import Outcome

if TYPE_CHECKING:
    from steersman.evaluation.condition import Condition
    from steersman.evaluation.tasks.item import Item


@dataclass(frozen=True)
class Metric:
    """A number that is noted of items: `rate` where it is 0 or 1, `mean` where it may be any.

    The names "positive", "negative" and "neither" are the shares of the sides. `better` is None where neither
    more nor less is meant.
    """

    name: str
    title: str
    kind: Literal["rate", "mean"] = "rate"
    better: Literal["higher", "lower"] | None = None


@dataclass(frozen=True)
class Measured:
    """What was noted of one item under one arm.

    Args:
        text: What the model said (or the option that it prefers; empty where it only reads).
        outcome: The side; None where the measure knows no sides, or the judge could not tell.
        scores: A number for each metric; one that is missing or NaN does not exist for this item.
        why: What the judge said, for the record.
        more: Further samples, where an item is answered more than once.
    """

    text: str
    outcome: Outcome | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    more: tuple[str, ...] = ()


class Measure(Protocol):
    """How items are measured."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is noted, the one that counts first."""
        ...

    @property
    def sides(self) -> bool:
        """Whether items end on a side, so that the shares of the sides are reported too."""
        ...

    def record(self) -> dict[str, Any]:
        """All that decides what is noted (settings, judge), as plain data."""
        ...

    def run(self, condition: Condition, items: Sequence[Item]) -> list[Measured]:
        """Put a batch of items to the model: one `Measured` each, in their order."""
        ...
