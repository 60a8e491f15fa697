"""How to screen: the options, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from steersman.edits import SCOPES, Scope
from steersman.errors import PlanError, whole_number
from steersman.evaluation.screening.greedy import LEAST_T
from steersman.experts.causal_effects import SIGNS, Gate, Sign
from steersman.experts.estimate import LEAST_CLUSTERS

Method = Literal["exact", "estimate", "auto"]
By = Literal["d", "answer"]
Choose = Literal["greedy", "rounds"]
Signs = Literal["deactivate", "activate", "both"]


@dataclass(frozen=True)
class Options:
    """How to screen; see `screen_experts`."""

    method: Method = "auto"
    signs: Signs = "both"
    by: By = "d"
    exact_runs: int = 48
    subsets: int = 0
    choose: Choose = "greedy"
    at_most: int = 8
    gate: Gate = field(default_factory=Gate)
    least_t: float = LEAST_T
    scope: Scope = "all"
    limit: int = 400
    harm_limit: int = 300
    seed: int = 0
    batch_size: int = 128
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        for name, known in (
            ("method", ("exact", "estimate", "auto")),
            ("by", ("d", "answer")),
            ("choose", ("greedy", "rounds")),
            ("signs", ("deactivate", "activate", "both")),
            ("scope", tuple(SCOPES)),
        ):
            if getattr(self, name) not in known:
                raise PlanError(f"{name}={getattr(self, name)!r} is unknown: use {', '.join(known)}")
        for name, least in (
            ("exact_runs", 1),
            ("subsets", 0),
            ("at_most", 0),
            ("seed", 0),
            ("limit", LEAST_CLUSTERS),
            ("harm_limit", 1),
            ("batch_size", 1),
            ("max_new_tokens", 1),
        ):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, PlanError))
        if not 0 <= self.least_t < math.inf:
            raise PlanError(f"least_t={self.least_t!r}: right is a number from 0")
        if not (0 < self.gate.q <= 1 and 0 <= self.gate.effect < math.inf):
            raise PlanError(
                f"the gate is q {self.gate.q:g} and effect {self.gate.effect:g}: right is a q above 0, at "
                "most 1, and an effect from 0 nats"
            )

    @property
    def whole(self) -> bool:
        """Whether d is of whole answers."""
        return self.by == "answer"

    @property
    def chosen_signs(self) -> tuple[Sign, ...]:
        """The signs to screen with."""
        return SIGNS if self.signs == "both" else (self.signs,)
