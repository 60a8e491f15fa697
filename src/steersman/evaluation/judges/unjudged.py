"""No judge: of tasks in which nothing is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steersman.evaluation.judges.verdict import Verdict

if TYPE_CHECKING:
    from steersman.evaluation.tasks.item import Item


class Unjudged:
    """Says of every answer that it could not tell."""

    def record(self) -> dict[str, Any]:
        return {"judge": None}

    def judge(self, items: Sequence[Item], texts: Sequence[str]) -> list[Verdict]:
        return [Verdict(None, why="this task is not judged") for _ in texts]
