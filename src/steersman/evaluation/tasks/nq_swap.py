"""NQ-Swap: documents in which the answer has been swapped for another, against what is known by heart.

Longpre et al., arXiv 2109.05052. Rows: question, org_context, sub_context, org_answer, sub_answer.
"""

from __future__ import annotations

from steersman.evaluation.judges import ScorerJudge
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.asking import SHORT, question_on
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows


@task_form("nq-swap", "NQ-Swap: the document's swapped answer, against the one known by heart")
def nq_swap(place: str, *, limit: int | None) -> Task:
    """Each question after its document with the other answer in it."""
    rows = read_rows(place, "JSON lines with question, sub_context, sub_answer, org_answer", config=None)
    judge = ScorerJudge("contains")
    behaviour = Behaviour(
        "Answering from the document",
        "gives the document's answer where it contradicts what is known",
        "document",
        "memory",
        judge,
        Answers(judge, max_new_tokens=32, extra=judge.metrics),
    )
    return Task(f"nq-swap:{place}", items_of(rows, _item, limit), behaviour)


def _item(row: Row) -> Item:
    swapped, original = row.texts("sub_answer"), row.texts("org_answer")
    asked = row.text("question")
    if set(swapped) & set(original):
        raise row.error(f'"sub_answer" and "org_answer" are both {swapped[0]!r}')
    return Item(
        id=row.label("id", "idx") or row.number,
        group=asked,  # a question is there with several swapped answers
        content=question_on(row.text("sub_context"), asked, SHORT),
        positive=swapped[0],
        negative=original[0],
        kind="",
        facts={"positives": list(swapped), "negatives": list(original)},
    )
