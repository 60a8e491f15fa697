"""Effects of single experts on a behaviour, what makes one count, and sets chosen by them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from steersman.experts.estimate import Floats, q_values

Sign = Literal["deactivate", "activate"]
SIGNS: tuple[Sign, ...] = ("deactivate", "activate")
"""Index 0 and 1 of every array over signs: the expert alone at λ = −1, and at λ = 1."""
Direction = Literal["toward", "reversed"]
DIRECTIONS: tuple[Direction, ...] = ("toward", "reversed")

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Gate:
    """What an effect must reach to count: significance, and size."""

    q: float = 0.05
    effect: float = 0.1
    """In nats."""


@dataclass(frozen=True)
class Pick:
    """An expert of a chosen set, in the order of choice: λ, and what it added in nats of the objective, with
    the cluster-robust standard error.
    """

    layer: int
    expert: int
    strength: float
    gain: float
    standard_error: float

    @property
    def t(self) -> float:
        """gain / standard_error"""
        return self.gain / self.standard_error if self.standard_error else float("inf")


@dataclass(frozen=True)
class ChosenSet:
    """The experts chosen for one direction, why no more were, how many were tried, and how far they move d
    together (mean in nats, standard error) on the items that they were chosen by.
    """

    picks: tuple[Pick, ...]
    reason: str
    candidates: int
    shift: float = 0.0
    shift_error: float = 0.0

    @property
    def gain(self) -> float:
        """What all picks added, in nats of the objective."""
        return sum(pick.gain for pick in self.picks)

    @property
    def strengths(self) -> dict[int, dict[int, float]]:
        """{layer: {expert: λ}}"""
        found: dict[int, dict[int, float]] = {}
        for pick in self.picks:
            found.setdefault(pick.layer, {})[pick.expert] = pick.strength
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "experts": [{**vars(pick), "t": min(pick.t, 1e9)} for pick in self.picks],
            "gain": self.gain,
            "shift": self.shift,
            "shift_error": self.shift_error,
            "candidates": self.candidates,
            "stopped": self.reason,
        }


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects on d in nats: mean over items, cluster-robust standard error and p-value of none, float64
    [2, layers, experts] by `SIGNS`; NaN where not `measured`: no such expert, or it cannot be steered so.
    """

    mean: Floats
    standard_error: Floats
    p_values: Floats
    measured: Bools
    part: Floats | None = None
    """The q values of this part of a whole."""

    @cached_property
    def q_values(self) -> Floats:
        """Benjamini-Hochberg q over all that was measured, both signs together."""
        return q_values(self.p_values, self.measured) if self.part is None else self.part

    def of(self, sign: Sign) -> Effects:
        """Those of one sign, arrays [layers, experts]."""
        row = SIGNS.index(sign)
        fields = (self.mean, self.standard_error, self.p_values, self.measured, self.q_values)
        return Effects(*(values[row] for values in fields))

    def passing(self, gate: Gate) -> Bools:
        """Which effects are large enough and not chance."""
        with np.errstate(invalid="ignore"):
            return self.measured & (self.q_values < gate.q) & (np.abs(self.mean) >= gate.effect)
