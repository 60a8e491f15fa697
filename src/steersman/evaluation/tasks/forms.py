"""All forms of tasks that are part of the package: importing this registers them."""

from __future__ import annotations

from steersman.evaluation.tasks import (
    diversity,
    emotions,
    faitheval,
    gsm8k,
    ifeval,
    jsonl,
    lab,
    nq_swap,
    safety,
    squad,
    text,
    toxicity,
    truthfulqa,
    xstest,
)

FORMS = (
    lab,
    jsonl,
    xstest,
    safety,
    squad,
    nq_swap,
    faitheval,
    truthfulqa,
    emotions,
    toxicity,
    ifeval,
    diversity,
    gsm8k,
    text,
)
"""The modules, one for each form."""


def register() -> None:
    """Nothing more to do: the import has registered them."""
