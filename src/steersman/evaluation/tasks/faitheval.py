"""FaithEval: documents that contradict the world, leave the question open, or contradict themselves.

Ming et al., arXiv 2410.03727. Counterfactual rows: question, context, choices
{"label": [...], "text": [...]}, answerKey; unanswerable and inconsistent ones: question, context, answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from steersman.evaluation.judges import ListJudge, Unjudged, phrase_list
from steersman.evaluation.measures import Answers, Choice
from steersman.evaluation.tasks.asking import SHORT, question_on
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

UNKNOWN = 'If the document does not answer the question, say "unknown".'
CONFLICT = 'If the document gives contradictory answers to the question, say "conflict".'


@task_form("faitheval", "FaithEval, counterfactual: the option that the document supports, by log-likelihood")
def counterfactual(place: str, *, limit: int | None) -> Task:
    """Multiple choice after documents that contradict what is known."""
    behaviour = Behaviour(
        "Choosing by the document",
        "prefers the option that the document supports, against what is known",
        "document",
        "another option",
        Unjudged(),
        Choice(),
    )
    rows = read_rows(place, "FaithEval's counterfactual rows")
    return Task(f"faitheval:{place}", items_of(rows, _choice, limit), behaviour)


@task_form("faitheval-unanswerable", "FaithEval, unanswerable: says that the document holds no answer")
def unanswerable(place: str, *, limit: int | None) -> Task:
    """Documents without the answer."""
    behaviour = _noticing("Abstaining", "says that the document holds no answer", "abstained", "abstentions")
    rows = read_rows(place, "FaithEval's unanswerable rows")
    items = items_of(rows, _noticed("unknown", UNKNOWN), limit)
    return Task(f"faitheval-unanswerable:{place}", items, behaviour)


@task_form("faitheval-inconsistent", "FaithEval, inconsistent: says that the document contradicts itself")
def inconsistent(place: str, *, limit: int | None) -> Task:
    """Documents with two answers."""
    behaviour = _noticing(
        "Noticing conflict", "says that the document contradicts itself", "noticed", "conflicts"
    )
    rows = read_rows(place, "FaithEval's inconsistent rows")
    items = items_of(rows, _noticed("conflict", CONFLICT), limit)
    return Task(f"faitheval-inconsistent:{place}", items, behaviour)


def _noticing(title: str, does: str, positive: str, phrases: str) -> Behaviour:
    judge = ListJudge(phrase_list(phrases))
    return Behaviour(title, does, positive, "answered", judge, Answers(judge, max_new_tokens=32))


def _noticed(word: str, instruction: str) -> Callable[[Row], Item]:
    def item(row: Row) -> Item:
        content = question_on(row.text("context"), row.text("question"), SHORT, instruction)
        answers = row.texts("answers") if row.fields.get("answers") else ()
        id_ = row.label("qid", "id") or row.number
        return Item(id_, id_, content, word, answers[0] if answers else None, row.label("subset"))

    return item


def _choice(row: Row) -> Item:
    choices = row.fields.get("choices")
    if not isinstance(choices, Mapping) or not {"label", "text"} <= set(choices):
        raise row.error('"choices" is missing, or lacks "label" and "text"')
    options = Row({"text": choices["text"]}, f'{row.where}, "choices"').texts("text")
    labels = [str(label) for label in choices["label"]]
    key = row.label("answerKey")
    if len(labels) != len(options) or key not in labels:
        raise row.error(
            f'"answerKey" is {key!r}; right is one of {", ".join(labels)}, for {len(options)} options'
        )
    right = labels.index(key)
    content = question_on(row.text("context"), row.text("question"), SHORT)
    id_ = row.label("id", "qid") or row.number
    return Item(id_, id_, content, options[right], None, "", options, (right,))
