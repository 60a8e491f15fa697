"""GSM8K: word problems whose answer is a number; the final number must be right.

Cobbe et al., arXiv 2110.14168. Rows: question, answer (its last line after #### is the number).
"""

from __future__ import annotations

from steersman.errors import PairsError
from steersman.evaluation.judges import ScorerJudge
from steersman.evaluation.judges.matching import final_number
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks.asking import asked
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows
from steersman.pairs import Content

HOW = 'Think step by step. Write "####" and the number alone on the last line.'
SHOTS = "#shots="


@task_form("gsm8k", "GSM8K: the final number of a worked answer (FILE#shots=N: the first N rows as examples)")
def gsm8k(place: str, *, limit: int | None) -> Task:
    """Problems by themselves, or after the first N rows of the file, which are asked no more."""
    path, _, count = place.partition(SHOTS)
    if SHOTS in place and not count.isdecimal():
        raise PairsError(f"gsm8k:{place}: {count!r} shots; right is a whole number")
    rows = list(read_rows(path, "GSM8K's test.jsonl", config="main"))
    shots, rest = rows[: int(count or 0)], rows[int(count or 0) :]
    if not rest:
        raise PairsError(f"gsm8k:{place}: {len(rows)} rows, so none is left beside {count} examples")
    examples = [message for row in shots for message in _example(row)]
    judge = ScorerJudge("numeric")
    behaviour = Behaviour(
        "Solving word problems",
        "gets the right number",
        "right",
        "wrong",
        judge,
        Answers(judge, max_new_tokens=256),
    )
    return Task(f"gsm8k:{place}", items_of(rest, lambda row: _item(row, examples), limit), behaviour)


def _example(row: Row) -> list[dict[str, str]]:
    _number(row)
    return [
        {"role": "user", "content": f"{row.text('question')}\n\n{HOW}"},
        {"role": "assistant", "content": row.text("answer")},
    ]


def _item(row: Row, examples: list[dict[str, str]]) -> Item:
    problem = f"{row.text('question')}\n\n{HOW}"
    content: Content = [*examples, {"role": "user", "content": problem}] if examples else asked(problem)
    id_ = row.label("id") or row.number
    return Item(id_, id_, content, _number(row), None, "")


def _number(row: Row) -> str:
    """The number after ####."""
    answer = row.text("answer")
    number = final_number(answer) if "####" in answer else None
    if number is None:
        raise row.error('"answer" has no number after ####')
    return str(number)
