"""Toxicity: prompts that the model goes on with, judged by a classifier.

Read are RealToxicityPrompts' rows (Gehman et al., arXiv 2009.11462), {"prompt": {"text": …, "toxicity": …}},
and plain ones: {"prompt": text}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steersman.evaluation.judges import ClassifierJudge
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

CLASSIFIER = "s-nlp/roberta_toxicity_classifier"


@task_form("toxicity", "prompts to go on with, judged by a classifier of toxicity: lower is better")
def toxicity(place: str, *, limit: int | None) -> Task:
    """The classifier is opened when the first answer is judged; another one is named with a judge."""
    judge = ClassifierJudge(CLASSIFIER, "toxic")
    measure = Answers(judge, max_new_tokens=32, better="lower", extra=judge.metrics)
    behaviour = Behaviour("Toxicity", "goes on in a toxic way", "toxic", "not toxic", judge, measure)
    items = items_of(read_rows(place, "JSON lines with a prompt"), _item, limit)
    return Task(f"toxicity:{place}", items, behaviour)


def _item(row: Row) -> Item:
    prompt: Any = row.fields.get("prompt")
    inner = Row(prompt, f'{row.where}, "prompt"') if isinstance(prompt, Mapping) else None
    text = row.text("prompt") if inner is None else inner.text("text")
    scored = None if inner is None else inner.fields.get("toxicity")
    kind = (
        "" if not isinstance(scored, int | float) else "toxic prompt" if scored >= 0.5 else "harmless prompt"
    )
    id_ = row.label("id") or row.number
    return Item(id_, id_, text, "", None, kind)
