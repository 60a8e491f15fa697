"""The report as one HTML page: no request, a policy that lets nothing but its own script run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from steersman.evaluation.evaluation_report.chapters import chapters
from steersman.evaluation.evaluation_report.experts import experts_of
from steersman.evaluation.evaluation_report.items import Shown, shown_items
from steersman.evaluation.evaluation_report.key_figures import key_figures
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import (
    arm_names,
    arms_by,
    arms_table,
    side_effects_table,
)
from steersman.evaluation.evaluation_report.verdicts import headline, side_effects_sentence
from steersman.evaluation.report import environment
from steersman.showing import count_of


@dataclass(frozen=True)
class ItemsOf:
    """The shown items of one task."""

    title: str
    shown: Sequence[Shown]


def page(result: Place) -> str:
    """The page of an evaluation whose texts are harmless."""
    style, script = _source("page.css") + _source("evaluation.css"), _source("evaluation.js")
    items = [ItemsOf(task.value["title"], shown_items(result, task)) for task in result["tasks"]]
    items = [of for of in items if of.shown]
    side_effects = side_effects_table(result)
    return (
        environment()
        .get_template("evaluation.html.jinja")
        .render(
            title=title_of(result),
            headline=headline(result),
            key_figures=key_figures(result),
            warnings=result.value["warnings"],
            effects=chapters(result, "effect", drawn=True),
            sides=chapters(result, "side"),
            side_effects=side_effects if side_effects.rows else None,
            side_sentences=[side_effects_sentence(result, arm) for arm in arms_by(result, "steered")],
            experts=experts_of(result),
            items=items,
            kinds=sorted({item.kind for of in items for item in of.shown if item.kind}),
            arms_shown=list(enumerate(arm_names(result, own_section=True)))[1:],
            arms=arms_table(result),
            limits=result.value["limits"],
            facts=facts(result),
            style=Markup(style),
            style_hash=_sha256(style),
            script=Markup(script),
            script_hash=_sha256(script),
        )
    )


def title_of(result: Place) -> str:
    """What the report is about."""
    model = result.value["model"]["name"] or "a model in memory"
    *others, last = [steering["name"] for steering in result.value["steerings"]] or [""]
    if not last:
        return f"What {model} does"
    return f"What {', '.join(others)} and {last} do to {model}" if others else f"What {last} does to {model}"


def facts(result: Place) -> list[tuple[str, str]]:
    """All that says how the evaluation came about."""
    value = result.value
    model = value["model"]
    known: list[tuple[str, Any]] = [
        ("model", model["name"]),
        ("revision", model["revision"]),
        ("weights", model["weights_id"]),
        *((f"plan {steering['name']}", steering["fingerprint"]) for steering in value["steerings"]),
        *(
            (f"task {task['name']}", f"{count_of(task['items'], 'item')}, sha256 {task['sha256']}")
            for task in value["tasks"]
        ),
        ("seed", value["seed"]),
        *value["settings"].items(),
        ("made", f"{value['created']}, with steersman {value['steersman']}"),
    ]
    return [(name, str(of)) for name, of in known if of not in (None, "")]


def _source(name: str) -> str:
    """A style or script as it is in the templates' folder."""
    loader = environment().loader
    if loader is None:
        raise RuntimeError("the templates have no loader")
    return loader.get_source(environment(), name)[0]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
