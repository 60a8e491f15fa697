"""The open form: JSON lines with prompts and what either side answers, judged by a scorer of one's choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from steersman.evaluation.judges import Judge, Unjudged, load_judge
from steersman.evaluation.measures import Answers, Choice, Measure
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows

EXAMPLE = '{"prompt": question, "positive": answer, …}'
FIELDS = ("prompt", "messages", "text", "positive", "negative", "options", "correct", "kind", "group", "id")
HEADER = ("scorer", "title", "does", "sides", "better", "max_new_tokens", "answers")
CHOICE = "choice"


@dataclass(frozen=True)
class _Header:
    """What a first line without a prompt says of all the others."""

    scorer: str | None = None
    title: str = ""
    does: str = "gives the positive answer"
    sides: tuple[str, str] = ("positive", "negative")
    better: Literal["higher", "lower"] | None = "higher"
    max_new_tokens: int | None = None
    answers: bool | None = None


@task_form("jsonl", f"JSON lines of your own, judged by a scorer: {EXAMPLE}")
def jsonl(place: str, *, limit: int | None) -> Task:
    """FILE or FILE#SCORER; without one the first line's, else `choice` where there are options, else
    `normalised`.
    """
    path, scorer = place, None
    if not Path(place).is_file() and "#" in place:
        path, _, scorer = place.rpartition("#")
    rows = list(read_rows(path, f"a file of {EXAMPLE}"))
    header = _Header()
    if _is_header(rows[0]):
        header, rows = _header(rows[0]), rows[1:]
    chosen = scorer or header.scorer or (CHOICE if rows and rows[0].has("options") else "normalised")
    items = items_of(rows, lambda row: _item(row, chosen == CHOICE), limit)
    behaviour = _behaviour(header, chosen, Path(path).stem)
    return Task(f"jsonl:{place}", items, behaviour)


def _behaviour(header: _Header, scorer: str, name: str) -> Behaviour:
    judge: Judge
    measure: Measure
    if scorer == CHOICE:
        judge, measure = Unjudged(), Choice()
    else:
        judge = load_judge(scorer)
        extra = tuple(getattr(judge, "metrics", ()))
        measure = Answers(judge, max_new_tokens=header.max_new_tokens, better=header.better, extra=extra)
    # A scorer that compares with the answers has answers; what a judge is given may be anything.
    answers = getattr(judge, "answers", False) if header.answers is None else header.answers
    return Behaviour(header.title or name, header.does, *header.sides, judge, measure, answers)


def _is_header(row: Row) -> bool:
    """Whether a first line is about all the others: it names the scorer, or has nothing of an item."""
    given = set(row.fields)
    return "scorer" in given or (bool(given & set(HEADER)) and not given & set(FIELDS))


def _header(row: Row) -> _Header:
    for name in row.fields:
        if name not in HEADER:
            known = next(of for of in HEADER if of in row.fields)
            raise row.error(
                f'"{name}" beside "{known}"; a first line about all others holds {", ".join(HEADER)}'
            )
    fields = dict(row.fields)
    for name in ("scorer", "title", "does"):
        if name in fields:
            row.text(name)
    if "sides" in fields:
        fields["sides"] = row.texts("sides")
        if len(fields["sides"]) != 2:
            raise row.error('"sides" are two names: what the positive side is called, and the negative one')
    if fields.get("better", "higher") not in ("higher", "lower", None):
        raise row.error(f'"better" is {fields["better"]!r}; right is higher, lower or null')
    if not isinstance(fields.get("answers"), bool | None):
        raise row.error(
            f'"answers" is {fields["answers"]!r:.40}; right is true where "positive" and "negative" are what '
            "a model would say, else false"
        )
    tokens = fields.get("max_new_tokens")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise row.error(f'"max_new_tokens" is {tokens!r}; right is a whole number above 0')
    return _Header(**fields)


def _item(row: Row, choice: bool) -> Item:
    if unknown := [name for name in row.fields if name not in FIELDS]:
        if unknown[0] in HEADER:
            raise row.error(f'"{unknown[0]}" stands in a first line of its own, without a prompt')
        raise row.error(f'unknown field "{unknown[0]}"; right are {", ".join(FIELDS)}')
    id_ = row.label("id") or row.number
    options: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    if choice:
        options = row.texts("options")
        correct = _correct(row, options)
    positives = (options[correct[0]],) if choice and not row.has("positive") else row.texts("positive")
    negatives = row.texts("negative") if row.has("negative") else ()
    if both := set(positives) & set(negatives):
        raise row.error(f"{min(both)!r:.40} is the answer of both sides; right is of one")
    facts: Mapping[str, Any] = {"positives": list(positives), "negatives": list(negatives)}
    return Item(
        id=id_,
        group=row.label("group") or id_,
        content=row.content("prompt"),
        positive=positives[0],
        negative=negatives[0] if negatives else None,
        kind=row.label("kind"),
        options=options,
        correct=correct,
        facts=facts if len(positives) > 1 or len(negatives) > 1 else {},
    )


def _correct(row: Row, options: tuple[str, ...]) -> tuple[int, ...]:
    """Places from 0, or the right options themselves."""
    value = row.fields.get("correct")
    values = value if isinstance(value, list) else [value]
    if len(options) < 2 or len(set(options)) < len(options):
        raise row.error('"options" must be at least two, all different')
    places = [options.index(one) if one in options else one for one in values]
    if not places or any(type(place) is not int or not 0 <= place < len(options) for place in places):
        raise row.error(
            f'"correct" is {value!r:.40}; right is a place from 0 to {len(options) - 1}, '
            "an option, or several"
        )
    if len(set(places)) == len(options):
        raise row.error('every option is "correct", so there is nothing to choose')
    return tuple(sorted(set(cast(list[int], places))))
