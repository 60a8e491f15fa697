"""The chapter of the report about a model in which nothing was planted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from markupsafe import Markup

from steersman.certainty import CANNOT_TELL, Control, controls_in_words
from steersman.evaluation import figures
from steersman.evaluation.concluded import verdict_of
from steersman.evaluation.figures import Whisker
from steersman.evaluation.natural_study import EFFECT, OBSERVED, SCREENED, SIDE, NaturalStudy
from steersman.evaluation.report import Finding, both_themes, percent, signed
from steersman.evaluation.statistics import RandomControl

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
        effect, side = tasks_of(self.study)
        return {
            "template": "natural.html.jinja",
            "id": self.id,
            "title": self.title,
            "intro": self.intro,
            "findings": findings(self.study),
            "pictures": _pictures(effect, side),
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
                {
                    "steering": control["steering"],
                    "observed": signed(control["observed"], 2),
                    "mean": signed(control["mean"], 2),
                    "words": _among(control)[1],
                }
                for control in effect["random"]
            ],
        }


def findings(study: NaturalStudy) -> list[Finding]:
    """What screening found in a model that nobody prepared, what it does, and what it costs."""
    if SCREENED not in study.plans:
        return [Finding("screening finds experts that cause it", CANNOT_TELL, study.screen.reason)]
    effect, side = tasks_of(study)
    control: dict[str, Any] = next(row for row in effect["random"] if row["steering"] == SCREENED)
    (among, words), both = _among(control), (SCREENED, f"{SCREENED} reversed")
    return [
        *(_found(ARMS[arm], effect, arm, [among], words) for arm in both),
        *(_found(f"cost, everyday requests right, {ARMS[arm]}", side, arm) for arm in both),
    ]


def _among(control: Mapping[str, Any]) -> tuple[Control, str]:
    """A record's drawn control, and it in words."""
    among = Control(len(control["draws"]), control["p"])
    return among, controls_in_words(among, control["at_least"])


def tasks_of(study: NaturalStudy) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's tasks: digits, and everyday requests."""
    tasks = {task["name"]: task for task in study.evaluation.to_json()["tasks"]}
    return tasks[EFFECT], tasks[SIDE]


def _found(
    claim: str, task: Mapping[str, Any], arm: str, controls: Sequence[Control] = (), words: str = ""
) -> Finding:
    """An arm's change of a task's share on the positive side."""
    found = task["differences"][arm]["positive"]
    base, own = (percent(task["results"][name]["positive"]["rate"]) for name in ("base", arm))
    value, low, high = (signed(100 * found[part]) for part in ("difference", "low", "high"))
    figures = f"{base} → {own}, {value} points (95% interval {low} to {high})"
    return Finding(claim, verdict_of(found, controls), "; ".join(filter(None, [figures, words])))


def _pictures(effect: Mapping[str, Any], side: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Both tasks under every arm, and the screened experts among random plans."""
    drawn = [
        _rates("Numbers in digits", effect),
        _rates("Everyday requests answered right", side),
    ]
    for row in effect["random"]:
        if row["steering"] == SCREENED:
            control = RandomControl(
                **{field.name: row[field.name] for field in fields(RandomControl) if field.name != "draws"},
                draws=tuple(row["draws"]),
            )
            alt = (
                f"Effects of {len(control.draws)} random plans, {signed(control.mean, 2)} on average, and of "
                f"the screened experts, {signed(control.observed, 2)}, in nats between digits and words."
            )
            title = "Screened experts among random plans, both directions together"
            drawn.append((title, _draws(control, alt)))
    return drawn


def _draws(control: RandomControl, alt: str) -> Markup:
    return both_themes(lambda theme: figures.random_draws(control, theme=theme, name="screened experts"), alt)


def _rates(title: str, task: Mapping[str, Any]) -> tuple[str, Markup]:
    sides: dict[str, Any] = {SCREENED: "positive", f"{SCREENED} reversed": "negative"}
    rows = []
    for arm, label in ARMS.items():
        if arm in task["results"]:
            found = task["results"][arm]["positive"]
            limits = (found["low"], found["high"])
            note = f"{percent(found['rate'])}  [{percent(limits[0])}, {percent(limits[1])}]"
            rows.append(Whisker(label, found["rate"], limits, note, sides.get(arm, "neutral")))
    alt = f"{title}: " + "; ".join(f"{row.label} {row.note}" for row in rows) + "."
    return title, both_themes(lambda theme: figures.whiskers(rows, theme=theme, share=True), alt)
