"""What an evaluation says, in sentences whose numbers are those of its tables.

Each begins with its verdict: shown, not shown, or cannot tell (`steersman.certainty`).
"""

from __future__ import annotations

from collections.abc import Sequence

from steersman.certainty import CANNOT_TELL, LEAST_CONTROLS, NOT_SHOWN, SHOWN, Control, Verdict
from steersman.evaluation.concluded import FAMILIES, concluded, family_of, verdict_of
from steersman.evaluation.evaluation_report.numbers import (
    Pieces,
    adjusted_p,
    difference,
    equals,
    estimate,
    interval,
    p_piece,
)
from steersman.evaluation.evaluation_report.place import Place
from steersman.evaluation.evaluation_report.tables import (
    arms_by,
    is_one_sided,
    is_preference,
    why_untold,
    within_margin,
)

ORDER: tuple[Verdict, ...] = (SHOWN, NOT_SHOWN, CANNOT_TELL)


def verdict_on(result: Place, task: Place, arm: str) -> Verdict:
    """The verdict on what an arm does to a task's first metric."""
    return concluded(task.value, next(of for of in result.value["arms"] if of["name"] == arm))


def effect_sentence(result: Place, task: Place, arm: str, *, titled: bool = True) -> Pieces:
    """How much an arm moves what counts, with what certainty; `titled` says of which task."""
    metric = task.value["metrics"][0]
    found = task["differences"][arm].get(metric["name"])
    what = f"“{metric['title']}”" + (f" ({task.value['title']})" if titled else "")
    verdict = verdict_on(result, task, arm)
    if not found:
        return (f"Cannot tell: {arm} and {what}: could not be measured.",)
    if verdict == SHOWN:
        direction = "raises" if found.value["difference"] > 0 else "lowers"
        base, own = (estimate(task["results"][name].get(metric["name"])) for name in ("base", arm))
        return (f"Shown: {arm} {direction} {what} from ", *base, " to ", *own, ": ", *uncertainty(found), ".")
    if verdict == NOT_SHOWN:
        return (f"Not shown: {arm} and {what}: ", *uncertainty(found), f"; {within_margin(found)}.")
    if interval(found) and _is_clear(found):
        why: Pieces = ("clear of 0, but ", *_control_words(task, arm))
    else:
        why = why_untold(task, metric["name"], found)
    return (f"Cannot tell: {arm} and {what}: ", *uncertainty(found), "; ", *why, ".")


def _is_clear(found: Place) -> bool:
    return verdict_of(found.value) == SHOWN


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


def control_sentences(task: Place, plan: str) -> list[Pieces]:
    """Whether a plan moves what is measured further than each family of plans that were drawn beside it."""
    found = controls_of_plan(task, plan)
    if not found:
        return [("Cannot tell whether any plan of this shape does as much: no random plans were run.",)]
    return [_control_sentence(random, plan) for random in found]


def _control_sentence(random: Place, plan: str) -> Pieces:
    """Whether it moves it further than those of one family, and which way."""
    control = Control(len(random.value["draws"]), random.value["p"])
    what = "d (how much likelier the positive answer is, log-odds)" if is_preference(random.value) else "it"
    way = "up" if random.value["observed"] > 0 else "down"
    either = way if is_one_sided(random.value) else "either way"
    others = family_of(random.value)
    further = f"{plan} moves {what} further {way} than {others} move it {either}"
    start = "Shown: " if control.beaten else "Cannot tell whether "
    return (start, further, ": ", *_counted(random), ".")


def _counted(random: Place) -> Pieces:
    """How many random plans did as much, and whether so many can show anything."""
    count = len(random.value["draws"])
    few = "" if Control(count, 1.0).carries else f", and fewer than {LEAST_CONTROLS} can show nothing"
    as_much = random["at_least"].number(str)
    p = "one-sided p" if is_one_sided(random.value) else "p"
    return (as_much, f" of {count} did as much ({p} ", *equals(p_piece(random["p"])), f"){few}")


def _control_words(task: Place, arm: str) -> Pieces:
    found = [of for of in task["random"] or () if arm in of.value["arms"]]
    if not found:
        return ("no random plans were run beside it",)
    unbeaten = [of for of in found if not Control(len(of.value["draws"]), of.value["p"]).beaten]
    words: Pieces = ()
    for random in unbeaten or found:
        name = (
            "the random plans"
            if family_of(random.value) == FAMILIES["random"]
            else "the label-shuffled concepts"
        )
        words = (*words, ", and " if words else "", f"of {name} ", *_counted(random))
    return words


def controls_of_plan(task: Place, plan: str) -> list[Place]:
    """The drawn controls of a plan, one for each family."""
    controls = task["random"] if task["random"] else ()
    return [found for found in controls if found.value["steering"] == plan]


def side_effects_sentence(result: Place, arm: str) -> Pieces:
    """What a plan does to each side task, by verdict."""
    found = side_differences(result, arm)
    if not found:
        return (f"Cannot tell what else {arm} does: no other task was run.",)
    pieces: Pieces = (f"Side effects of {arm}.",)
    for verdict in ORDER:
        of_it = [(task, change) for task, change in found if verdict_on(result, task, arm) == verdict]
        for place, (task, change) in enumerate(of_it):
            pieces = (*pieces, "; " if place else f" {verdict.capitalize()}: ", f"{task.value['title']} ")
            pieces = (*pieces, *_side_words(task, change, verdict))
        pieces = (*pieces, ".") if of_it else pieces
    return pieces


def _side_words(task: Place, change: Place, verdict: Verdict) -> Pieces:
    if not change:
        return ("could not be measured",)
    if verdict == SHOWN:
        return uncertainty(change)
    if verdict == NOT_SHOWN:
        return (*uncertainty(change), f", {within_margin(change)}")
    return (*uncertainty(change), ", ", *why_untold(task, task.value["metrics"][0]["name"], change))


def side_differences(result: Place, arm: str) -> list[tuple[Place, Place]]:
    """Each side task with what an arm changes in its first metric."""
    return [
        (task, task["differences"][arm].get(task.value["metrics"][0]["name"]))
        for task in result["tasks"]
        if task.value["role"] == "side" and arm in task.value["differences"]
    ]


def headline(result: Place) -> Sequence[Pieces]:
    """The first words: what each plan does to what it was made for, beyond chance, at what cost."""
    arms = arms_by(result, "steered")
    if not arms:
        return _without_plans(result)
    lines = [
        (
            *effect_sentence(result, task, arm),
            *(piece for sentence in control_sentences(task, arm) for piece in (" ", *sentence)),
        )
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
            effect_sentence(result, task, arm)
            for arm in arms_by(result, "prompt", "model")
            if arm in task.value["differences"]
        ]
    return lines


def works(result: Place, task: Place, arm: str) -> bool:
    """Whether what an arm does is shown."""
    return verdict_on(result, task, arm) == SHOWN
