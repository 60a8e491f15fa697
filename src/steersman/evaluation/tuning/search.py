"""The search: a coarse grid, a fine one around its best, and of all whose cost is kept the largest effect.

No optimiser: every number stands in the table. A control is searched alike, but what costs more than the
first that passes is not looked at, which cannot change what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steersman.evaluation.statistics import Groups, Mean, clustered_mean
from steersman.evaluation.tuning.candidates import Candidate, Lever
from steersman.evaluation.tuning.costs import Cost
from steersman.models.plan_rows import Floats
from steersman.ties import MEASURED, ranks

EffectsOf = Callable[[Lever, Sequence[Candidate]], Floats]
"""The change of the effect's number under each candidate: [candidates, items]."""
CostsOf = Callable[[Lever, Candidate], Mapping[str, Cost]]


@dataclass(frozen=True)
class Tried:
    """One candidate on the development items: its effect, and what it costs; None: not looked at."""

    candidate: Candidate
    effect: Mean
    costs: Mapping[str, Cost] | None
    stage: str

    @property
    def passes(self) -> bool:
        """Whether every cost is kept, and the effect goes the right way."""
        if self.costs is None:
            return False
        return self.effect.mean > 0 and all(cost.kept for cost in self.costs.values())

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            **self.candidate.to_json(),
            "stage": self.stage,
            "effect": self.effect.mean,
            "effect_low": _plain(self.effect.low),
            "effect_high": _plain(self.effect.high),
            "costs": None if self.costs is None else {name: c.to_json() for name, c in self.costs.items()},
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Searched:
    """All that was tried of one lever, best effect first."""

    lever: Lever
    tried: tuple[Tried, ...]

    @property
    def passing(self) -> list[Tried]:
        """The candidates whose cost is kept, the largest effect first."""
        return [one for one in self.tried if one.passes]

    @property
    def best(self) -> Tried | None:
        """The first of them; None where nothing passes."""
        return next(iter(self.passing), None)


def search(
    lever: Lever, effects_of: EffectsOf, costs_of: CostsOf, groups: Groups, *, every: bool, fine: bool = True
) -> Searched:
    """Search one lever.

    Args:
        lever: What is searched.
        effects_of, costs_of: Measure candidates on the development items.
        groups: Of those items.
        every: Look at the costs of all candidates, for the table; else only until one passes.
        fine: Whether a fine grid follows.
    """
    tried = _stage(lever, lever.coarse(), "coarse", effects_of, groups)
    tried = _costed(lever, tried, costs_of, every)
    best = Searched(lever, tuple(tried)).best
    if best is not None and fine:
        known = {one.candidate for one in tried}
        more = [one for one in dict.fromkeys(lever.fine(best.candidate)) if one not in known]
        if more:
            tried = _ordered([*tried, *_stage(lever, more, "fine", effects_of, groups)])
            tried = _costed(lever, tried, costs_of, every)
    return Searched(lever, tuple(tried))


def _stage(
    lever: Lever, candidates: Sequence[Candidate], stage: str, effects_of: EffectsOf, groups: Groups
) -> list[Tried]:
    if not candidates:
        return []
    changes = effects_of(lever, candidates)
    return _ordered(
        [
            Tried(candidate, clustered_mean(change, groups), None, stage)
            for candidate, change in zip(candidates, changes, strict=True)
        ]
    )


def _ordered(tried: Sequence[Tried]) -> list[Tried]:
    """Largest effect first; of equal ones, up to rounding, what steers less."""
    order = ranks([one.effect.mean for one in tried], MEASURED)
    places = sorted(range(len(tried)), key=lambda place: (int(order[place]), tried[place].candidate.order))
    return [tried[place] for place in places]


def _costed(lever: Lever, tried: Sequence[Tried], costs_of: CostsOf, every: bool) -> list[Tried]:
    found: list[Tried] = []
    settled = False
    for one in tried:
        wanted = every or (not settled and one.effect.mean > 0)
        if one.costs is None and wanted:
            one = replace(one, costs=costs_of(lever, one.candidate))
        settled |= one.passes
        found.append(one)
    return found


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
