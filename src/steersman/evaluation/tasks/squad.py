"""SQuAD: questions with the document that answers them, or without it; unanswerable ones are to be declined.

Rajpurkar et al., arXiv 1606.05250 and 1806.03822. Read are the published JSON (data → paragraphs → qas) and
flat rows with context, question and answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from steersman.evaluation.judges import ScorerJudge
from steersman.evaluation.judges.scorers import UNANSWERABLE
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.asking import SHORT, question, question_on
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

DECLINE = f'If the document does not answer the question, say "{UNANSWERABLE}".'


@task_form("squad", "SQuAD with its documents: the document's answer, abstention where it has none")
def squad(place: str, *, limit: int | None) -> Task:
    """Questions after their documents; with SQuAD 2.0's, every prompt says how to decline."""
    return _task("squad", place, limit, "Answering from the document", "gives the document's answer")


@task_form("squad-closed", "SQuAD's answerable questions without a document: what is known by heart")
def squad_closed(place: str, *, limit: int | None) -> Task:
    """The same questions by themselves."""
    return _task("squad-closed", place, limit, "Answering by heart", "gives the answer without its document")


def _task(form: str, place: str, limit: int | None, title: str, does: str) -> Task:
    rows = [flat for row in read_rows(place, "dev-v1.1.json or dev-v2.0.json") for flat in _flat(row)]
    closed = form == "squad-closed"
    some_unanswerable = any(_unanswerable(row) for row in rows)
    items = items_of(rows, lambda row: _item(row, closed, some_unanswerable), limit)
    judge = ScorerJudge("squad")
    negative = "abstains wrongly" if closed or not some_unanswerable else "abstains or answers wrongly"
    measure = Answers(judge, max_new_tokens=32, extra=judge.metrics)
    return Task(f"{form}:{place}", items, Behaviour(title, does, "right", negative, judge, measure))


def _flat(row: Row) -> Iterator[Row]:
    """A row for each question, of an article of the published form, or of a row that is one already."""
    if "paragraphs" not in row.fields:
        yield row
        return
    for paragraph in _list(row, "paragraphs"):
        document = paragraph.text("context")
        for qa in _list(paragraph, "qas"):
            yield Row({**qa.fields, "context": document}, qa.where)


def _list(row: Row, name: str) -> Iterable[Row]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise row.error(f'"{name}" is {"missing" if values is None else repr(values)[:40]}; right is a list')
    return [Row(value, f"{row.where}, {name} {number}") for number, value in enumerate(values, 1)]


def _item(row: Row, closed: bool, some_unanswerable: bool) -> Item | None:
    unanswerable = _unanswerable(row)
    if closed and unanswerable:
        return None
    document, asked = row.text("context"), row.text("question")
    answers = [UNANSWERABLE] if unanswerable else _answers(row)
    instructions = [SHORT, DECLINE] if some_unanswerable else [SHORT]
    content = question(asked, SHORT) if closed else question_on(document, asked, *instructions)
    kinds = ("answerable", UNANSWERABLE) if some_unanswerable and not closed else ("", "")
    id_ = row.label("id") or row.number
    return Item(id_, document, content, answers[0], None, kinds[unanswerable], facts={"positives": answers})


def _unanswerable(row: Row) -> bool:
    if "is_impossible" in row.fields:
        return bool(row.fields["is_impossible"])
    answers = row.fields.get("answers")
    return answers == [] or (isinstance(answers, Mapping) and answers.get("text") == [])


def _answers(row: Row) -> list[str]:
    """Each wording once: of [{"text": …}, …], or {"text": [...]}."""
    value = row.fields.get("answers")
    if isinstance(value, Mapping):
        texts = value.get("text")
        value = [{"text": text} for text in texts] if isinstance(texts, list) else None
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise row.error(f'"answers" is {"missing" if value is None else repr(value)[:40]}; right is a list')
    return list(dict.fromkeys(Row(one, f'{row.where}, "answers"').text("text") for one in value))
