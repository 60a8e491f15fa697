"""What an evaluation says, in sentences whose numbers are those of its tables."""

from __future__ import annotations

from collections.abc import Sequence

from steersman.evaluation.evaluation_report.numbers import (
    Pieces,
    adjusted_p,
    detectable,
    difference,
    equals,
    estimate,
    interval,
    is_clear,
    is_clear_alone,
    p_piece,
)
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import UNCLEAR, UNTOLD, arms_by
from steersman.evaluation.report import SIGNIFICANT


def effect_sentence(task: Place, arm: str, *, titled: bool = True) -> Pieces:
    """How much an arm moves what counts, with what certainty; `titled` says of which task."""
    metric = task.value["metrics"][0]
    found = task["differences"][arm].get(metric["name"])
    what = f"“{metric['title']}”" + (f" ({task.value['title']})" if titled else "")
    if not found:
        return (f"{arm}: {what} could not be measured.",)
    if adjusted_p(found).value is None:
        return (f"{arm} and {what}: ", *uncertainty(found), f"; {UNTOLD}.")
    if not is_clear(found):
        if is_clear_alone(found):
            return (f"{arm} and {what}: ", *uncertainty(found), f"; {UNCLEAR}.")
        could = detectable(task, metric["name"], found)
        return (
            f"{arm} shows no difference in {what}: ",
            *uncertainty(found),
            *(("; could have seen ", *could) if could else ()),
            ".",
        )
    direction = "raises" if found.value["difference"] > 0 else "lowers"
    base, own = (estimate(task["results"][name].get(metric["name"])) for name in ("base", arm))
    return (f"{arm} {direction} {what} from ", *base, " to ", *own, ": ", *uncertainty(found), ".")


def uncertainty(found: Place) -> Pieces:
    """A difference with its interval and p-value."""
    limits = interval(found)
    p = adjusted_p(found)
    holm = " after Holm's correction" if p.pointer.endswith("p_holm") else ""
    stated = (*difference(found), " (")
    if limits:
        stated = (*stated, "95% interval ", *limits)
    if p.value is not None:
        stated = (*stated, "; " if limits else "", "p ", *equals(p_piece(p)), holm)
    return (*stated, ")") if limits or p.value is not None else difference(found)


def random_sentence(task: Place, plan: str) -> Pieces:
    """Whether random plans do as much as a plan."""
    random = random_of(task, plan)
    if not random:
        return ("No random plans were run: whether any plan of this shape does as much is not known.",)
    as_much = random.value["at_least"]
    return (
        "None" if as_much == 0 else random["at_least"].number(str),
        f" of {len(random.value['draws'])} random plans of the same shape did as much as {plan} (p ",
        *equals(p_piece(random["p"])),
        ").",
    )


def random_of(task: Place, plan: str) -> Place:
    """The random control of a plan; a place of nothing where there is none."""
    controls = task["random"] if task["random"] else ()
    return next((found for found in controls if found.value["steering"] == plan), Place(None))


def side_effects_sentence(result: Place, arm: str) -> Pieces:
    """Which side tasks a plan changes; where it changes none, what could have been seen."""
    found = side_differences(result, arm)
    if not found:
        return ("Side effects were not measured.",)
    seen = [(task, change) for task, change in found if is_clear(change)]
    if not seen:
        pieces: Pieces = (f"No side effect of {arm} seen on {_tasks(len(found))}",)
        for place, (task, change) in enumerate(found):
            could = detectable(task, task.value["metrics"][0]["name"], change)
            if could:
                pieces = (
                    *pieces,
                    " (could have seen " if place == 0 else ", ",
                    *could,
                    f" in “{task.value['title']}”",
                )
        return (*pieces, ")." if len(pieces) > 1 else ".")
    pieces = (f"Side effects of {arm}: ",)
    for place, (task, change) in enumerate(seen):
        pieces = (*pieces, "; " if place else "", f"{task.value['title']} ", *uncertainty(change))
    return (*pieces, f". {len(found) - len(seen)} of {_tasks(len(found))} show none.")


def side_differences(result: Place, arm: str) -> list[tuple[Place, Place]]:
    """Each side task with what an arm changes in its first metric."""
    return [
        (task, task["differences"][arm].get(task.value["metrics"][0]["name"]))
        for task in result["tasks"]
        if task.value["role"] == "side" and arm in task.value["differences"]
    ]


def _tasks(count: int) -> str:
    return "one side task" if count == 1 else f"{count} side tasks"


def headline(result: Place) -> Sequence[Pieces]:
    """The first words: what each plan does to what it was made for, beyond chance, at what cost."""
    arms = arms_by(result, "steered")
    if not arms:
        return _without_plans(result)
    lines = [
        (*effect_sentence(task, arm), " ", *random_sentence(task, arm))
        for task in result["tasks"]
        if task.value["role"] == "effect"
        for arm in arms
        if arm in task.value["differences"]
    ]
    return [*lines, *(side_effects_sentence(result, arm) for arm in arms)]


def _without_plans(result: Place) -> list[Pieces]:
    """What the base does, and how the arms that are no plans differ from it."""
    lines: list[Pieces] = []
    for task in result["tasks"]:
        metric = task.value["metrics"][0]
        found = task["results"]["base"].get(metric["name"])
        limits = interval(found)
        within = (" (95% interval ", *limits, ")") if limits else ()
        lines.append((f"base: “{metric['title']}” ({task.value['title']}) ", *estimate(found), *within, "."))
        lines += [
            effect_sentence(task, arm)
            for arm in arms_by(result, "prompt", "model")
            if arm in task.value["differences"]
        ]
    return lines


def works(task: Place, arm: str, plan: str) -> bool:
    """Whether an arm's effect is clear, and its plan's beyond random plans where there are any."""
    found = task["differences"][arm].get(task.value["metrics"][0]["name"])
    random = random_of(task, plan)
    return is_clear(found) and (not random or random.value["p"] <= SIGNIFICANT)
