"""The chapter of the report about a model in which nothing was planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steersman.evaluation.natural_study import EFFECT, OBSERVED, SCREENED, SIDE, NaturalStudy
from steersman.evaluation.report import signed

ARMS = {
    "base": "unsteered",
    SCREENED: "screened experts, toward digits",
    f"{SCREENED} reversed": "screened experts, toward words",
    OBSERVED: "risk difference, toward digits",
    f"{OBSERVED} reversed": "risk difference, toward words",
    "prompt": "told to answer in digits",
}


@dataclass(frozen=True)
class NaturalChapter:
    """One study on the page; `link` leads to the whole evaluation."""

    id: str
    title: str
    intro: str
    study: NaturalStudy
    link: str

    def content(self) -> dict[str, Any]:
        """What its template shows."""
        told = self.study.evaluation.to_json()
        effect, side = (
            next(task for task in told["tasks"] if task["name"] == name) for name in (EFFECT, SIDE)
        )
        return {
            "template": "natural.html.jinja",
            "id": self.id,
            "title": self.title,
            "intro": self.intro,
            "verdict": verdict(self.study),
            "works": works(self.study),
            "link": self.link,
            "model": self.study.model,
            "sizes": (effect["items"], side["items"]),
            "rows": [
                (label, [effect["results"][arm]["positive"], side["results"][arm]["positive"]])
                for arm, label in ARMS.items()
                if arm in effect["results"]
            ],
            "experts": [
                (f"layer {pick.layer}, expert {pick.expert}", pick.gain, pick.standard_error)
                for pick in self.study.screen.sets["toward"].picks
            ],
            "controls": [
                {**control, "observed": signed(control["observed"], 2), "mean": signed(control["mean"], 2)}
                for control in effect["random"]
            ],
        }


def works(study: NaturalStudy) -> bool:
    """Whether both directions move the rate, each interval clear of 0, by more than random plans do."""
    if SCREENED not in study.plans:
        return False
    up = study.evaluation.difference(EFFECT, SCREENED)
    down = study.evaluation.difference(EFFECT, f"{SCREENED} reversed")
    return bool(up["low"] > 0 and down["high"] < 0 and _control(study)["p"] <= 0.05)


def verdict(study: NaturalStudy) -> str:
    """In one sentence, what screening found in a model that nobody prepared."""
    if SCREENED not in study.plans:
        return f"Screening chose no experts, and says so: {study.screen.reason}."
    up, down = (_in_points(study, arm) for arm in (SCREENED, f"{SCREENED} reversed"))
    moved = f"{up} toward digits, {down} the other way"
    control = _control(study)
    beyond = f"{control['at_least']} of {len(control['draws'])} random plans do as much"
    return f"{'An effect in both directions' if works(study) else 'Not both directions'}: {moved}; {beyond}."


def _in_points(study: NaturalStudy, arm: str) -> str:
    """An arm's difference to the base in percentage points, with its interval."""
    found = study.evaluation.difference(EFFECT, arm)
    value, low, high = (signed(100 * found[part]) for part in ("difference", "low", "high"))
    return f"{value} points [{low}, {high}]"


def _control(study: NaturalStudy) -> dict[str, Any]:
    effect = next(task for task in study.evaluation.to_json()["tasks"] if task["name"] == EFFECT)
    found: dict[str, Any] = next(row for row in effect["random"] if row["steering"] == SCREENED)
    return found
