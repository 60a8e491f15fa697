"""Evidence in a steering's manifest: hashes of evaluations, or such a hash with what it found in brief."""

from __future__ import annotations

import math
import re
from typing import Any

from steersman.artifacts.fields import exact_keys, one_of, text_in, whole
from steersman.errors import ArtifactError

KEYS = {"kind", "sha256", "created", "steersman", "tasks"}
_TEXTS = ("task", "sha256", "metric", "arm", "arm_kind")
_NUMBERS = ("strength", "difference", "low", "high", "p", "p_holm", "random_p")
TASK_KEYS = {*_TEXTS, *_NUMBERS, "role", "items", "kind"}


def read_evidence(value: Any, *, in_brief: bool) -> tuple[str | dict[str, Any], ...]:
    """The evidence of a manifest: strings, and objects where they are allowed (`in_brief`).

    Raises ArtifactError for anything else.
    """
    if not isinstance(value, list):
        raise ArtifactError("evidence is not a list")
    for number, entry in enumerate(value):
        name = f"evidence[{number}]"
        if in_brief and isinstance(entry, dict):
            _check_brief(entry, name)
        elif not isinstance(entry, str):
            raise ArtifactError(f"{name} is not a string" + (" or an object" if in_brief else ""))
    return tuple(value)


def _check_brief(entry: dict[str, Any], name: str) -> None:
    exact_keys(entry, KEYS, name)
    one_of(entry["kind"], f"{name}.kind", ("evaluation",))
    if not re.fullmatch("[0-9a-f]{64}", text_in(entry["sha256"], f"{name}.sha256")):
        raise ArtifactError(f"{name}.sha256 is not a sha256")
    text_in(entry["created"], f"{name}.created")
    text_in(entry["steersman"], f"{name}.steersman")
    if not isinstance(entry["tasks"], list):
        raise ArtifactError(f"{name}.tasks is not a list")
    for number, task in enumerate(entry["tasks"]):
        _check_task(task, f"{name}.tasks[{number}]")


def _check_task(task: Any, name: str) -> None:
    exact_keys(task, TASK_KEYS, name)
    for key in _TEXTS:
        text_in(task[key], f"{name}.{key}")
    one_of(task["role"], f"{name}.role", ("effect", "side"))
    one_of(task["kind"], f"{name}.kind", ("rate", "mean"))
    whole(task["items"], f"{name}.items")
    for key in _NUMBERS:
        number = task[key]
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ArtifactError(f"{name}.{key} is not a number")
        if isinstance(number, float) and not math.isfinite(number):
            raise ArtifactError(f"{name}.{key} is not a number")
