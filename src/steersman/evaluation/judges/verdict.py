"""What a judge gives: the side of an answer and numbers of it, or that it could not be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item

Outcome = Literal["positive", "negative", "neither"]
OUTCOMES: tuple[Outcome, ...] = ("positive", "negative", "neither")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    `outcome` is None where the judge could not tell (a malformed verdict): such items are counted apart and
    are on no side. `scores` are numbers of the judge's own metrics; `why` is what it said, for the record.
    """

    outcome: Outcome | None
    scores: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


class Judge(Protocol):
    """Decides which side of a behaviour each answer is on."""

    def record(self) -> dict[str, Any]:
        """What the judge is, as plain data for the evaluation's record: its name, and all that decides
        verdicts (phrases, model, prompt).
        """
        ...

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        """The verdict on each generated text. Raises JudgeError where the judge itself cannot be had."""
        ...
