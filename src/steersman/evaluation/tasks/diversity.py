"""Diversity: how different the answers are that a model gives to the same prompt at temperature 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from steersman.evaluation.judges import Unjudged
from steersman.evaluation.measures import Samples
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import Row, items_of, read_rows
from steersman.pairs import read_text

PROMPTS = ("prompt", "instruction", "question")


@task_form("diversity", "prompts sampled 8 times each: Vendi score, distinct-1, distinct-2")
def diversity(place: str, *, limit: int | None) -> Task:
    """A text file with a prompt a line, or rows with a prompt, messages, or a text to go on with."""
    rows = (
        _lines(Path(place))
        if Path(place).suffix.lower() == ".txt"
        else read_rows(place, "JSON lines with a prompt")
    )
    behaviour = Behaviour("Diversity of answers", "gives answers that differ", "", "", Unjudged(), Samples())
    return Task(f"diversity:{place}", items_of(rows, _item, limit), behaviour)


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield Row({"prompt": line.strip()}, f"{path}:{number}")


def _item(row: Row) -> Item:
    id_ = row.label("id") or row.number
    return Item(id_, id_, row.content(*PROMPTS), "", None, row.label("category", "kind"))
