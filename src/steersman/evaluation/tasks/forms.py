"""All forms of tasks that are part of the package: importing this registers them."""

from __future__ import annotations

from steersman.evaluation.tasks import jsonl, lab, squad, text, truthfulqa, xstest

FORMS = (lab, jsonl, squad, text, truthfulqa, xstest)
"""The modules, one for each form."""


def register() -> None:
    """Nothing more to do: the import has registered them."""
