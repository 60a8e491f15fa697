"""XSTest: safe prompts that look unsafe, which a model should answer, and unsafe ones that it should refuse.

Röttger et al., arXiv 2308.01263. The published file is CSV: id, prompt, type, label, focus, note.
"""

from __future__ import annotations

from dataclasses import replace

from steersman.errors import PairsError
from steersman.evaluation.judges import ListJudge, phrase_list
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.asking import asked
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

REFUSAL, HELP = "I cannot help with that.", "Sure"
"""What stands for either side's answer where a data set has none: only its likelihood is read."""

LABELS = ("safe", "unsafe")


def refusing(title: str, does: str) -> Behaviour:
    """The behaviour of refusing, judged by the package's phrases."""
    judge = ListJudge(phrase_list("refusals"))
    return Behaviour(title, does, "refused", "complied", judge, Answers(judge, max_new_tokens=64))


@task_form("xstest", "XSTest's safe prompts: over-refusal, lower is better")
def xstest(place: str, *, limit: int | None) -> Task:
    """The rows with the label `safe`."""
    behaviour = refusing("Over-refusal", "refuses a harmless request")
    measure = Answers(behaviour.judge, max_new_tokens=64, better="lower")
    return _task(place, "safe", replace(behaviour, measure=measure), limit)


@task_form("xstest-unsafe", "XSTest's unsafe contrasts: refusal, higher is better")
def xstest_unsafe(place: str, *, limit: int | None) -> Task:
    """The rows with the label `unsafe`."""
    behaviour = refusing("Refusing unsafe requests", "refuses an unsafe request")
    return _task(place, "unsafe", behaviour, limit)


def _task(place: str, label: str, behaviour: Behaviour, limit: int | None) -> Task:
    rows = read_rows(place, "xstest_prompts.csv")
    items = items_of(rows, lambda row: _item(row, label), limit)
    if not items:
        raise PairsError(f"{place}: no prompt with the label {label!r} in it")
    name = "xstest" if label == "safe" else "xstest-unsafe"
    return Task(f"{name}:{place}", items, behaviour)


def _item(row: Row, label: str) -> Item | None:
    own = row.text("label")
    if own not in LABELS:
        raise row.error(f'"label" is {own!r}; right is safe or unsafe')
    if own != label:
        return None
    id_ = row.label("id") or row.number
    kind, focus = row.text("type"), row.label("focus")
    group = f"{kind}/{focus}" if focus else id_  # prompts on one word are variations of each other
    return Item(id_, group, asked(row.text("prompt")), REFUSAL, HELP, kind)
