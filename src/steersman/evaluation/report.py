"""The report: studies as one self-contained HTML page, for a reader who has never heard of steering."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steersman.certainty import (
    MARGIN,
    SHOWN,
    Control,
    Verdict,
    controls_in_words,
    p_value,
    verdict,
)
from steersman.evaluation import figures
from steersman.evaluation.comparison import BASE, REVERSED, TOWARD, Comparison, Example
from steersman.evaluation.figures import RateRow, Theme
from steersman.evaluation.statistics import PairedDifference, RandomControl, Rate
from steersman.evaluation.study import Study
from steersman.showing import count_of

EXAMPLES = 6


@dataclass(frozen=True)
class Finding:
    """One claim, what may be said of it, and the figures that decide that."""

    claim: str
    verdict: Verdict
    figures: str

    def __str__(self) -> str:
        return f"{self.verdict.capitalize()}: {self.claim}: {self.figures}."


@dataclass(frozen=True)
class Chapter:
    """One study on the page; `intro` says in words what it is about and what is known beforehand."""

    id: str
    title: str
    intro: str
    study: Study

    def content(self) -> dict[str, Any]:
        """What its template shows."""
        return {"template": "experts.html.jinja", **_chapter(self)}


class OnPage(Protocol):
    """A chapter of any kind."""

    def content(self) -> dict[str, Any]:
        """What its template shows, and which that is."""


@dataclass(frozen=True)
class KeyFigure:
    """One number of the first screen, in large type, with what it is above and its uncertainty below."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class FirstSight:
    """What the page begins with, on a phone too: a prompt, the answers to it side by side, and a picture."""

    example: Example
    labels: dict[str, str]
    picture: Markup
    caption: str


def first_sight(study: Study) -> FirstSight:
    """The base's answer beside the steered one, of an item on which they differ, and the shares of all."""
    effect = study.effect
    sides = effect.task.behaviour
    rows = [
        replace(row, label=label)
        for row, label in zip(_rate_rows(effect), ("as it is", "steered", "the other way"), strict=True)
    ]
    return FirstSight(
        example=effect.examples(1)[0],
        labels={BASE: "as it is", TOWARD: "steered"},
        picture=both_themes(lambda theme: figures.narrow_rates(rows, theme=theme), _rates_alt(effect)),
        caption=f"Share “{sides.positive}” of {count_of(len(effect.task), 'request')}, with 95% intervals.",
    )


@dataclass(frozen=True)
class Report:
    """What the page says. Texts are plain and get escaped; commands are shown as they are."""

    title: str
    lead: Sequence[str]
    key_figures: Sequence[KeyFigure]
    caution: str
    chapters: Sequence[OnPage]
    commands: Sequence[tuple[str, str]]
    limits: Sequence[str]
    facts: Sequence[tuple[str, str]]
    first: FirstSight | None = None


def write_report(path: str | Path, report: Report) -> None:
    """Render the report into one HTML file that asks no network for anything."""
    Path(path).write_text(render_report(report), encoding="utf-8")


def render_report(report: Report) -> str:
    """The page as text."""
    chapters = [chapter.content() for chapter in report.chapters]
    return environment().get_template("report.html.jinja").render(report=report, chapters=chapters)


# ---------------------------------------------------------------- verdicts and words


def findings(study: Study) -> list[Finding]:
    """What a plan and its reverse do, among random plans of their shape; and what both cost."""
    count = sum(len(experts) for experts in study.toward.strengths.values())
    among = Among.of(study.control)
    return [
        *(
            effect_found(
                f"{count_of(count, 'expert')}, {arm_label(arm, study.effect)}", study.effect, arm, [among]
            )
            for arm in (TOWARD, REVERSED)
        ),
        *(
            effect_found(f"cost, {cost.task.behaviour.title.lower()}, {short_label(arm)}", cost, arm)
            for cost in study.costs
            for arm in (TOWARD, REVERSED)
        ),
    ]


@dataclass(frozen=True)
class Among:
    """An effect among those of random interventions: the control, and it in words."""

    control: Control
    words: str

    @classmethod
    def of(cls, found: RandomControl, what: str = "random plans of its shape") -> Among:
        """Of a measured control."""
        control = Control(len(found.draws), found.p)
        return cls(control, controls_in_words(control, found.at_least, what))


def effect_found(claim: str, comparison: Comparison, arm: str, among: Sequence[Among] = ()) -> Finding:
    """What an arm does to the share on the positive side, against the base on the same items; `among`: the
    controls that are due.
    """
    found = comparison.differences[arm]
    figures = (
        f"{percent(comparison.rate(BASE))} → {percent(comparison.rate(arm))}, {points(found)} (95% interval "
        f"{points_range(found)})"
    )
    said = verdict(found.low, found.high, margin=MARGIN, controls=[each.control for each in among])
    return Finding(claim, said, "; ".join([figures, *(each.words for each in among)]))


def works_both_ways(study: Study) -> bool:
    """Whether it is shown that both directions move the rate as they are meant to."""
    up, down = study.effect.differences[TOWARD], study.effect.differences[REVERSED]
    shown = all(found.verdict == SHOWN for found in findings(study)[:2])
    return shown and up.low > 0 and down.high < 0


def short_label(arm: str) -> str:
    """An arm's direction alone."""
    return "reversed" if arm == REVERSED else arm


def arm_label(arm: str, comparison: Comparison) -> str:
    """An arm's name for a reader."""
    sides = comparison.task.behaviour
    names = {
        BASE: "unsteered",
        TOWARD: f"toward “{sides.positive}”",
        REVERSED: f"reversed: toward “{sides.negative}”",
    }
    return names.get(arm, arm)


def percent(share: float) -> str:
    """A share as a percentage: whole, but never rounded to 0 or 100 when it is neither."""
    value = 100 * share
    if 0 < value < 0.5:
        return f"{max(value, 0.1):.1f}%"
    if 99.5 < value < 100:
        return f"{min(value, 99.9):.1f}%"
    return f"{value:.0f}%"


def range_of(found: Rate) -> str:
    """A rate's interval."""
    return f"{percent(found.low)} to {percent(found.high)}"


def points(found: PairedDifference) -> str:
    """A difference of rates in percentage points."""
    return f"{signed(100 * found.difference)} points"


def points_range(found: PairedDifference) -> str:
    """The interval of a difference, in percentage points."""
    return " to ".join(
        signed(100 * limit, 0 if abs(limit) >= 0.01 else 1) for limit in (found.low, found.high)
    )


def signed(value: float, digits: int = 0) -> str:
    """A number with its sign, a true minus, and no signed zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def experts_in_words(study: Study) -> str:
    """How many experts of how many are switched, and how."""
    strengths = [value for experts in study.toward.strengths.values() for value in experts.values()]
    up, down = sum(value > 0 for value in strengths), sum(value < 0 for value in strengths)
    total = int((study.contrast.activations[0] >= 0).sum())
    return f"{up + down} of {total} experts ({up} forced in, {down} kept out)"


# ---------------------------------------------------------------- what the template shows


def _chapter(chapter: Chapter) -> dict[str, Any]:
    study = chapter.study
    effect = study.effect
    return {
        "id": chapter.id,
        "title": chapter.title,
        "intro": chapter.intro,
        "findings": findings(study),
        "sides": effect.task.behaviour,
        "experts": experts_in_words(study),
        "study": study,
        "map": both_themes(
            lambda theme: figures.heatmap(study.contrast, study.toward, theme=theme),
            _map_alt(study),
        ),
        "rates": both_themes(
            lambda theme: figures.rates(_rate_rows(effect), theme=theme), _rates_alt(effect)
        ),
        "draws": both_themes(
            lambda theme: figures.random_draws(study.control, theme=theme), _draws_alt(study.control)
        ),
        "arms": [_arm_row(name, effect) for name in effect.arms],
        "differences": [_difference_row(name, effect) for name in effect.differences],
        "costs": [_cost(cost, effect) for cost in study.costs],
        "control": study.control,
        "chance": Among.of(study.control),
        "examples": effect.examples(EXAMPLES),
        "labels": {name: arm_label(name, effect) for name in effect.arms},
        "choice": study.choice,
    }


def _arm_row(name: str, comparison: Comparison) -> dict[str, Any]:
    arm = comparison.arms[name]
    preference = comparison.preferences.get(name)
    return {
        "label": arm_label(name, comparison),
        "rates": [arm.rates["positive"], arm.rates["negative"], arm.rates["neither"]],
        "preference": preference,
    }


def _difference_row(name: str, comparison: Comparison) -> dict[str, Any]:
    return {"label": arm_label(name, comparison), "found": comparison.differences[name]}


def _cost(cost: Comparison, effect: Comparison) -> dict[str, Any]:
    rows = []
    for name, arm in cost.arms.items():
        label = arm_label(name, effect)  # the arm is named by the behaviour that it steers
        found = cost.differences.get(name)
        said = "" if found is None else verdict(found.low, found.high, margin=MARGIN)
        rows.append({"label": label, "rate": arm.rates["positive"], "found": found, "verdict": said})
    return {
        "title": cost.task.behaviour.title,
        "does": cost.task.behaviour.does,
        "rows": rows,
        "count": len(cost.task),
    }


def _rate_rows(comparison: Comparison) -> list[RateRow]:
    sides: dict[str, Any] = {TOWARD: "positive", REVERSED: "negative"}
    return [
        RateRow(arm_label(name, comparison), arm.rates["positive"], sides.get(name, "neutral"))
        for name, arm in comparison.arms.items()
    ]


def both_themes(draw: Callable[[Theme], bytes], alt: str) -> Markup:
    """A picture in a light and a dark form, both inside the page."""
    light, dark = (base64.b64encode(draw(theme)).decode() for theme in ("light", "dark"))
    return Markup(
        '<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{}">'
        '<img src="data:image/png;base64,{}" alt="{}"></picture>'
    ).format(dark, light, alt)


def _map_alt(study: Study) -> str:
    rows, columns = study.contrast.risk_difference.shape
    first = study.contrast.table().iloc[0]
    return (
        f"Map of {rows} layers by {columns} experts coloured by risk difference. The largest is "
        f"{first['risk_difference']:+.2f} at layer {int(first['layer'])}, expert {int(first['expert'])}. "
        f"Outlined: {experts_in_words(study)}."
    )


def _rates_alt(comparison: Comparison) -> str:
    parts = [
        f"{arm_label(name, comparison)} {percent(arm.rates['positive'].rate)}, interval "
        f"{range_of(arm.rates['positive'])}"
        for name, arm in comparison.arms.items()
    ]
    return f"Share “{comparison.task.behaviour.positive}”: " + "; ".join(parts) + "."


def _draws_alt(control: RandomControl) -> str:
    return (
        f"Effects of {len(control.draws)} random plans, from {min(control.draws):+.1f} to "
        f"{max(control.draws):+.1f}, and of the plan itself, {control.observed:+.1f}."
    )


@cache
def environment() -> Environment:
    """Where the templates are: all that they are given is escaped."""
    made = Environment(
        loader=PackageLoader("steersman.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=percent,
        range_of=range_of,
        points=points,
        points_range=points_range,
        signed=signed,
        p_value=p_value,
    )
    return made
