"""The tasks that are known, by the form of what they are read from, and how one is opened by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from steersman.errors import PairsError, valid_name, whole_number
from steersman.evaluation.judges.verdict import Judge
from steersman.evaluation.tasks.item import Task
from steersman.showing import count_of

ENTRY_POINTS = "steersman.tasks"
"""Packages add forms by entry points of this group: name = form, value = a `Form`."""


class Form(Protocol):
    """Opens a task of one form: from what follows "FORM:", which is a file or a data set's name."""

    def __call__(self, place: str, *, limit: int | None) -> Task:
        """The first `limit` items (None: all). Raises PairsError that names file, line and field."""
        ...


_FORMS: dict[str, tuple[Form, str]] = {}
"""Ours, and those that programs have registered. Other packages' are loaded when they are asked for."""


def task_form(name: str, about: str) -> Callable[[Form], Form]:
    """Register a function that opens tasks written `name:PLACE`; `about` is one line for lists."""

    def register(form: Form) -> Form:
        _FORMS[name] = (form, about)
        return form

    return register


def known_forms() -> dict[str, str]:
    """Form → one line, those that other packages add included."""
    from steersman.evaluation.tasks import forms

    forms.register()
    ours = {name: about for name, (_, about) in _FORMS.items()}
    return {**{entry.name: f"from {entry.value}" for entry in entry_points(group=ENTRY_POINTS)}, **ours}


def load_task(source: str | Path, *, limit: int | None = None, judge: Judge | None = None) -> Task:
    """Open a task: `lab:NAME[/train|dev|test]`, `FORM:PLACE`, or a JSONL file of the form `jsonl`.

    Args:
        source: Its name.
        limit: The first so many items; None: all there are.
        judge: Instead of the task's own.

    Raises PairsError for an unknown form, a file that is not there, a row that lacks a field, and where there
    are fewer items than asked for.

    Example:
        >>> steersman.load_task("lab:refusal/dev", limit=8)
        <Task: lab:refusal/dev, 8 items: Refusing restricted requests>
    """
    source = valid_name(source, PairsError)
    limit = None if limit is None else whole_number(f"{source}: limit", limit, 1, PairsError)
    name, colon, place = source.partition(":")
    form = _form(name) if colon else None
    if form is None and (not colon or Path(source).is_file()):
        form, place = _form("jsonl"), source
    if form is None:
        raise PairsError(
            f"{source}: no such task; right is lab:NAME[/train|dev|test], a .jsonl file, or FORM:PLACE with "
            f"FORM one of {', '.join(known_forms())}"
        )
    task = form(place, limit=None if limit is None else min(limit, sys.maxsize))
    if limit is not None and len(task) < limit:
        raise PairsError(
            f"{source}: {count_of(limit, 'item')} asked for, but there are {len(task)}; ask for at most "
            "those, or leave the limit out"
        )
    return task if judge is None else task.judged_by(judge)


def _form(name: str) -> Form | None:
    """A form by its name, None where there is none; one of ours before another package's of the same name."""
    from steersman.evaluation.tasks import forms

    forms.register()
    if name not in _FORMS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            try:
                _FORMS[name] = (entry.load(), f"from {entry.value}")
            except (ImportError, AttributeError) as error:
                raise PairsError(f"{name}: the form cannot be loaded from {entry.value} ({error})") from error
    return _FORMS[name][0] if name in _FORMS else None
