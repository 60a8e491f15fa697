"""What a tuning found: every candidate, the one chosen, and what the test showed; and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.artifacts.folder import new_folder
from steersman.certainty import SHOWN, Control, Verdict, controls_in_words
from steersman.errors import PlanError
from steersman.evaluation.statistics import Mean, RandomControl
from steersman.evaluation.tuning.costs import Cost
from steersman.evaluation.tuning.search import Tried
from steersman.showing import Shown, Table, count_of, first_rows

if TYPE_CHECKING:
    import pandas as pd

    from steersman.steering import Steering

TUNING, CANDIDATES = "tuning.json", "candidates.csv"
PICTURES = ("effect_and_cost.png", "curve.png")
FILES = {TUNING, CANDIDATES, *PICTURES}


@dataclass(frozen=True)
class Confirmed:
    """The chosen candidate on the test items.

    Attributes:
        effect: Change of the effect's number toward the side steered for, with its 95 % interval.
        base: The number without steering.
        control: Among the effects of controls that were tuned alike.
        costs: What it costs there, each with its one-sided 95 % bound.
        answers: The same in answers; None where there were none.
        looks: The how many-th look at this test it was on this machine; None: not known.
        verdict: Of effect, controls and costs together.
    """

    effect: Mean
    base: float
    control: RandomControl | None
    costs: Mapping[str, Cost]
    answers: Mapping[str, Any] | None
    looks: int | None
    verdict: Verdict

    def to_json(self, *, brief: bool = False) -> dict[str, Any]:
        """The same as plain values; `brief` without what was answered, and the controls' single effects."""
        answers = None if self.answers is None else dict(self.answers)
        control = None if self.control is None else self.control.to_json()
        if brief:
            control = None if control is None else _without_draws(control)
            if answers is not None:
                del answers["shown"]
                answers["control"] = answers["control"] and _without_draws(answers["control"])
        return {
            "effect": self.effect.mean,
            "low": _plain(self.effect.low),
            "high": _plain(self.effect.high),
            "items": self.effect.count,
            "groups": self.effect.groups,
            "base": self.base,
            "control": control,
            "costs": {name: cost.to_json() for name, cost in self.costs.items()},
            "answers": answers,
            "looks": self.looks,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, repr=False)
class Tuning(Shown):
    """What was tried, chosen and confirmed.

    Attributes:
        made: What it was made of, as plain values.
        tried: Every candidate, the largest effect first.
        chosen: The one that was chosen on the development items; None where nothing passes.
        finalists: What the finalists answered.
        confirmed: What the test items showed of it.
        steering: Its plan; None where there is none.
    """

    made: Mapping[str, Any]
    tried: tuple[Tried, ...]
    chosen: Tried | None
    finalists: tuple[Mapping[str, Any], ...]
    confirmed: Confirmed | None
    steering: Steering | None

    @property
    def verdict(self) -> Verdict | None:
        """Of the test; None where nothing was chosen."""
        return None if self.confirmed is None else self.confirmed.verdict

    @property
    def why_none(self) -> str:
        """Why nothing was chosen, in one line; empty where something was."""
        if self.chosen is not None:
            return ""
        bounds = " and ".join(f"{bound['cost']} <= {bound['most']:g}" for bound in self.made["bounds"])
        right = [one for one in self.tried if one.effect.mean > 0]
        passing = [one for one in right if one.passes]
        if passing:
            finalists = count_of(len(self.finalists), "finalist")
            return f"nothing passes: the answers of all {finalists} are degenerate"
        if not right:
            return (
                f"nothing passes: none of {count_of(len(self.tried), 'candidate')} moves the effect as asked"
            )
        return (
            f"nothing passes: of {count_of(len(right), 'candidate')} that move the effect as asked none "
            f"keeps {bounds} by its one-sided 95 % bound; the largest effect is {right[0].effect.mean:+.3f}"
        )

    def require(self) -> Steering:
        """The chosen plan. Raises PlanError where nothing passes."""
        if self.steering is None:
            raise PlanError(self.why_none)
        return self.steering

    def to_json(self) -> dict[str, Any]:
        """Everything, as docs/tuning.md describes it."""
        return {
            **self.made,
            "candidates": [one.to_json() for one in self.tried],
            "finalists": [dict(one) for one in self.finalists],
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "confirmed": None if self.confirmed is None else self.confirmed.to_json(),
            "fingerprint": None if self.steering is None else self.steering.fingerprint,
            "why_none": self.why_none or None,
        }

    def table(self) -> pd.DataFrame:
        """One row a candidate: its settings, effect with interval, each cost with its bound."""
        import pandas as pd

        rows = []
        for one in self.tried:
            row = one.to_json()
            costs = row.pop("costs") or {}
            row |= {
                f"{name}_{key}": cost[key]
                for name, cost in costs.items()
                for key in ("value", "upper", "kept")
            }
            row = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the folder: tuning.json, candidates.csv and the pictures. Raises ArtifactError."""
        from steersman.evaluation.tuning.figures import curve, effect_and_cost

        with new_folder(folder, force=force, ours=FILES) as place:
            text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
            (place / TUNING).write_text(text + "\n", encoding="utf-8")
            self.table().to_csv(place / CANDIDATES, index=False)
            for name, draw in zip(PICTURES, (effect_and_cost, curve), strict=True):
                draw(self, place / name)

    def in_words(self) -> str:
        """What was chosen, and what the test said."""
        if self.chosen is None or self.confirmed is None:
            return self.why_none
        found = self.confirmed
        return (
            f"{self.chosen.candidate.in_words()}; on {count_of(found.effect.count, 'test item')} "
            f"{found.effect.mean:+.3f} [{found.effect.low:+.3f}, {found.effect.high:+.3f}]: {found.verdict}"
        )

    def as_tables(self) -> list[Table]:
        """The candidates with the largest effects."""
        return [first_rows(self.table())]


def confirmed_in_words(found: Confirmed) -> list[str]:
    """What the test showed, line by line."""
    lines = [
        f"effect {found.effect.mean:+.3f} [{found.effect.low:+.3f}, {found.effect.high:+.3f}] from "
        f"{found.base:+.3f}, {count_of(found.effect.count, 'test item')} in "
        f"{count_of(found.effect.groups, 'group')}; {_beside(found.control)}"
    ]
    for name, cost in found.costs.items():
        kept = "kept" if cost.kept else "NOT kept"
        lines.append(f"cost: {name} {cost.value:.3f}, at most {cost.upper:.3f} (95 %, one-sided): {kept}")
    if found.answers is not None:
        told = found.answers
        control = told["control"]
        beside = _beside(None if control is None else RandomControl(**control))
        lines.append(
            f"answers: {told['base']:.3f} → {told['steered']:.3f}, moved {told['moved']:+.3f} "
            f"[{told['low']:+.3f}, {told['high']:+.3f}]; {beside}: {told['verdict']}"
        )
    if found.looks is not None and found.looks > 1:
        lines.append(f"this was look {found.looks} at this test: each one makes it say less")
    lines.append(
        "shown: beyond its tuned controls, at the cost that was bounded"
        if found.verdict == SHOWN
        else f"{found.verdict}: see the figures above before you rely on it"
    )
    return lines


def _beside(control: RandomControl | None) -> str:
    if control is None:
        return "no controls were run"
    return controls_in_words(Control(len(control.draws), control.p), control.at_least, "tuned controls")


def _without_draws(control: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in control.items() if key != "draws"},
        "count": len(control["draws"]),
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
