"""The parts of an evaluation's record: one for each task, and what to be warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.certainty import Control, controls_in_words
from steersman.evaluation import summary
from steersman.evaluation.concluded import concluded, family_of
from steersman.evaluation.controlling import families, preferences, random_controls
from steersman.evaluation.measures.measure import Measured, Metric
from steersman.evaluation.planning import Arms
from steersman.evaluation.running import Part, Runner
from steersman.evaluation.shown import shown_items
from steersman.evaluation.tasks import Task
from steersman.evaluation.vector_controls import ShuffledConcepts
from steersman.showing import count_of

FEW = 100
"""Items below which a warning says that intervals are wide."""


@dataclass(frozen=True)
class Settings:
    """What decides an evaluation beside model, tasks and arms."""

    limit: int | None
    batch_size: int
    max_new_tokens: int
    random: int
    control_items: int
    shown: int
    seed: int
    match: str


LIMITS = (
    "The figures hold for these items, this model and this way of asking; intervals tell of other items of "
    "the same kind, not of other models, wordings or training seeds.",
    "Side effects were looked for only where tasks are named for them.",
    "Answers are judged as the record of each task says; a judge can be wrong.",
)


def task_record(
    runner: Runner,
    part: Part,
    task: Task,
    noted: Mapping[str, Sequence[Measured]],
    arms: Arms,
    steerings: Sequence[str],
    settings: Settings,
    shuffled: ShuffledConcepts,
) -> dict[str, Any]:
    """Everything that was measured of a task, as JSON, with the verdict on what each arm does; `task` holds
    the items that were asked, which are all of the part's but in the report of an unfinished run.
    """
    measured = part.role == "effect" and settings.random > 0
    metrics = summary.metrics_of(task)
    plain = [arm for arm in part.arms if arm.kind != "cell"]
    shown = {arm.name: noted[arm.name] for arm in part.arms}
    record: dict[str, Any] = {
        "name": task.name,
        "role": part.role,
        "title": task.behaviour.title,
        "does": task.behaviour.does,
        "sides": {"positive": task.behaviour.positive, "negative": task.behaviour.negative}
        if task.measure.sides
        else None,
        "items": len(task),
        "groups": len(set(task.groups)),
        "sha256": task.sha256,
        "record": task.measure.record(),
        "metrics": [vars(metric) for metric in metrics],
        "results": summary.results(task, noted, metrics),
        "unjudged": summary.unjudged(noted) if task.measure.sides else {},
        "differences": summary.differences(task, noted, metrics, arms),
        "kinds": summary.by_kind(task, noted, metrics[0]),
        "minimum_detectable": summary.detectable(task, noted, metrics),
        "random": random_controls(
            runner.once,
            runner.subject,
            part.task,
            arms,
            steerings,
            draws=settings.random,
            items=settings.control_items,
            seed=settings.seed,
            shuffled=shuffled,
        )
        if measured
        else None,
        "preferences": preferences(runner.once, runner.condition, part.task, plain) if measured else None,
        "dose_response": _doses(arms) if any(arm.kind == "strength" for arm in arms) else None,
        "factorial": _factorial(part, noted, arms, metrics[0], steerings) if part.role == "effect" else None,
        "shown": shown_items(
            runner.once, task, shown, {arm.name: runner.condition(arm) for arm in part.arms}, settings.shown
        ),
    }
    for arm in plain:
        if change := record["differences"].get(arm.name, {}).get(metrics[0].name):
            change["verdict"] = concluded(record, {"name": arm.name, "kind": arm.kind})
    return record


def _doses(arms: Arms) -> list[dict[str, Any]]:
    rows = [
        {"steering": arms.steering_of[arm.name], "strength": arms.strength_of[arm.name], "arm": arm.name}
        for arm in arms
        if arm.kind in ("steered", "strength", "reversed")
    ]
    return sorted(rows, key=lambda row: (str(row["steering"]), row["strength"]))


def _factorial(
    part: Part, noted: Mapping[str, Sequence[Measured]], arms: Arms, metric: Metric, steerings: Sequence[str]
) -> dict[str, Any] | None:
    if not arms.cells:
        return None
    return {
        "attacks": [{"name": name, "text": text} for name, text in arms.attacks.items()],
        "defences": [{"name": name, "text": text} for name, text in arms.defences.items()],
        "steerings": list(steerings),
        "metric": metric.name,
        "cells": [vars(cell) for cell in arms.cells],
        "interactions": summary.interactions(part.task, noted, arms.cells, metric),
    }


def more_steps(
    parts: Sequence[Part],
    arms: Arms,
    settings: Settings,
    steerings: Sequence[str],
    shuffled: ShuffledConcepts,
) -> int:
    """Steps that follow after all items: of the random control, of d, and of the items that are shown."""
    plain = [sum(arm.kind != "cell" for arm in part.arms) for part in parts]
    steps = sum(plain) - len(parts)
    if settings.random:
        effects = sum(part.role == "effect" for part in parts)
        own = sum(arm.kind not in ("cell", "model") for arm in arms)
        counts = [n for name in steerings for n in families(arms, name, settings.random, shuffled).values()]
        steps += effects * (sum(counts) + len(counts) + own)
    return steps


def unfinished(runner: Runner, tasks: Sequence[Mapping[str, Any]], settings: Settings) -> list[str]:
    """What of a run there is not yet, for the report of what there is."""
    items = {task["name"]: task["items"] for task in tasks}
    found = [
        f"{part.task.name}: unfinished: {items.get(part.task.name, 0)} of "
        f"{count_of(len(part.task), 'item')} are finished under every arm"
        for part in runner.parts
        if items.get(part.task.name, 0) < len(part.task)
    ]
    return found + [
        f"{task['name']}: unfinished: {len(control['draws'])} of {settings.random} {family_of(control)} are "
        f"finished beside {control['steering']}"
        for task in tasks
        for control in task["random"] or ()
        if control.get("family") == "random" and len(control["draws"]) < settings.random
    ]


def warnings(
    tasks: Sequence[Mapping[str, Any]], arms: Arms, steerings: Sequence[str], runner: Runner
) -> list[str]:
    found = []
    for task in tasks:
        for arm, count in task["unjudged"].items():
            if count:
                found.append(
                    f"{task['name']}: the judge could not place {count_of(count, 'answer')} of {arm}"
                )
        if task["items"] < FEW:
            found.append(f"{task['name']}: {count_of(task['items'], 'item')} only; intervals are wide")
        if task["random"] == [] and not runner.only_reads:
            found.append(f"{task['name']}: no random control: no item has a number to compare plans by")
        for control in task["random"] or ():
            among = Control(len(control["draws"]), control["p"])
            if not among.beaten:
                found.append(
                    f"{task['name']}: cannot tell whether {control['steering']} does more than others: "
                    f"{controls_in_words(among, control['at_least'], family_of(control))}"
                )
    if runner.subject.match == "architecture":
        found.append("plans that were made for other weights were taken (match: architecture)")
    for arm in arms:
        if arm.steering is not None and not any(runner.receipt(arm).values()):
            found.append(
                f"{arm.name}: no token was in the scope of its edits (compose --scope gives another)"
            )
    if not steerings:
        found.append("no steering was given: only the model itself was measured")
    return found
