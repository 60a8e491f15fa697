"""Chapters of the report about transplantation, and about plans of both levers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from steersman.evaluation import figures, transplant_figures
from steersman.evaluation.comparison import BASE, Comparison
from steersman.evaluation.figures import RateRow
from steersman.evaluation.levers_study import BOTH, EXPERTS, VECTOR, LeversStudy
from steersman.evaluation.report import (
    EXAMPLES,
    Among,
    Finding,
    both_themes,
    effect_found,
    percent,
    range_of,
)
from steersman.evaluation.transplant_study import OWN, TRANSPLANTED, UNMAPPED, TransplantStudy
from steersman.evaluation.vector_controls import DrawnControl

CONTROL_LABELS = {
    "random": "random vectors",
    "shuffled": "label-shuffled",
    "shuffled, as long": "label-shuffled, as long",
}


@dataclass(frozen=True)
class TransplantChapter:
    """One transplantation on the page."""

    id: str
    title: str
    intro: str
    study: TransplantStudy

    def content(self) -> dict[str, Any]:
        """What its template shows."""
        study = self.study
        sides = study.effect.task.behaviour
        labels = arm_labels(study)
        layer = study.bridge.layer_map(study.layer)
        return {
            "template": "transplant.html.jinja",
            "id": self.id,
            "title": self.title,
            "intro": self.intro,
            "findings": findings(study),
            "study": study,
            "sides": sides,
            "labels": labels,
            "layer": layer,
            "checks": [study.check.layers[number] for number in sorted(study.check.layers)],
            "sweep": both_themes(
                lambda theme: transplant_figures.sweep(
                    study.choice,
                    (sides.positive, "ordinary, right", "ordinary, refused"),
                    theme=theme,
                ),
                _sweep_alt(study),
            ),
            "strip": both_themes(
                lambda theme: transplant_figures.arms_and_draws(_rows(study), _controls(study), theme=theme),
                _strip_alt(study),
            ),
            "arms": [_arm(name, labels[name], study) for name in study.effect.arms],
            "controls": [(CONTROL_LABELS[drawn.name], drawn) for drawn in study.controls],
            "examples": study.effect.examples(EXAMPLES),
        }


@dataclass(frozen=True)
class LeversChapter:
    """One plan of both levers on the page."""

    id: str
    title: str
    intro: str
    study: LeversStudy

    def content(self) -> dict[str, Any]:
        """What its template shows."""
        study = self.study
        labels = {
            BASE: "unsteered",
            EXPERTS: "experts alone",
            VECTOR: "vector alone",
            BOTH: "both, in one plan",
        }
        return {
            "template": "levers.html.jinja",
            "id": self.id,
            "title": self.title,
            "intro": self.intro,
            "findings": levers_findings(study),
            "pictures": [_task_picture(comparison, labels) for comparison in study.comparisons.values()],
            "study": study,
            "rows": [
                (label, [comparison.arms[arm].rates["positive"] for comparison in study.comparisons.values()])
                for arm, label in labels.items()
            ],
            "tasks": [comparison.task.behaviour for comparison in study.comparisons.values()],
            "sizes": [len(comparison.task) for comparison in study.comparisons.values()],
        }


def findings(study: TransplantStudy) -> list[Finding]:
    """Whether the concept carries over, beyond all its controls; and what that costs."""
    among = [Among.of(drawn.control, CONTROL_LABELS[drawn.name]) for drawn in study.controls]
    sides = study.effect.task.behaviour
    cost = study.cost.task.behaviour.title.lower()
    return [
        effect_found(f"the transplanted concept, “{sides.positive}”", study.effect, TRANSPLANTED, among),
        effect_found(f"cost, {cost}", study.cost, TRANSPLANTED),
    ]


def levers_findings(study: LeversStudy) -> list[Finding]:
    """What the plan of both does where either part is meant to act, and what it costs."""
    found = []
    for name, comparison in study.comparisons.items():
        control = study.controls.get(name)
        task = comparison.task.behaviour
        if control is None:
            found.append(effect_found(f"cost of both, {task.title.lower()}", comparison, BOTH))
        else:
            part = "the experts are" if name == study.of_experts else "the vector is"
            claim = f"both, where {part} meant to act, “{task.positive}”"
            found.append(effect_found(claim, comparison, BOTH, [Among.of(control)]))
    return found


def _task_picture(comparison: Comparison, labels: dict[str, str]) -> tuple[str, Markup]:
    """A task's share under every arm, and what it is a share of."""
    sides: dict[str, Any] = {BOTH: "positive"}
    rows = [
        RateRow(labels[name], arm.rates["positive"], sides.get(name, "neutral"))
        for name, arm in comparison.arms.items()
    ]
    title = f"{comparison.task.behaviour.title}: {comparison.task.behaviour.positive}"
    alt = f"Share “{title}”: {_shares(comparison, labels)}."
    return title, both_themes(lambda theme: figures.rates(rows, theme=theme), alt)


def arm_labels(study: TransplantStudy) -> dict[str, str]:
    """The arms' names for a reader."""
    labels = {
        BASE: "unsteered",
        TRANSPLANTED: "transplanted concept",
        UNMAPPED: "the source's vector, unmapped",
        OWN: "the target's own vector",
    }
    return {name: labels[name] for name in study.effect.arms}


def _arm(name: str, label: str, study: TransplantStudy) -> dict[str, Any]:
    effect, cost = study.effect.arms[name].rates, study.cost.arms[name].rates
    return {
        "label": label,
        "rates": [effect["positive"], cost["positive"], cost["negative"]],
        "found": study.effect.differences.get(name),
    }


def _rows(study: TransplantStudy) -> list[RateRow]:
    labels = arm_labels(study)
    return [
        RateRow(labels[name], arm.rates["positive"], "positive" if name == TRANSPLANTED else "neutral")
        for name, arm in study.effect.arms.items()
    ]


def _controls(study: TransplantStudy) -> list[tuple[str, DrawnControl]]:
    return [(f"{CONTROL_LABELS[drawn.name]} ({len(drawn.control.draws)})", drawn) for drawn in study.controls]


def _shares(comparison: Comparison, labels: dict[str, str]) -> str:
    return "; ".join(
        f"{labels[name]} {percent(arm.rates['positive'].rate)}, interval {range_of(arm.rates['positive'])}"
        for name, arm in comparison.arms.items()
    )


def _strip_alt(study: TransplantStudy) -> str:
    drawn = "; ".join(
        f"{label}: mean {percent(found.control.mean)}, most {percent(max(found.control.draws))}"
        for label, found in _controls(study)
    )
    of_arms = _shares(study.effect, arm_labels(study))
    return f"Share “{study.effect.task.behaviour.positive}”: {of_arms}; {drawn}."


def _sweep_alt(study: TransplantStudy) -> str:
    points_ = "; ".join(
        f"dose {point.dose:g}: {percent(point.positive.rate)}, ordinary right "
        f"{percent(point.ordinary_right.rate)}, ordinary refused {percent(point.ordinary_refused.rate)}"
        for point in study.choice.sweep
    )
    return f"Share “{study.effect.task.behaviour.positive}” by dose on development items: {points_}."
