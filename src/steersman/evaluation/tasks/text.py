"""Plain text: how well it is read (perplexity), and how far from the unsteered model's expectations (KL)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from steersman.errors import PairsError
from steersman.evaluation.judges import Unjudged
from steersman.evaluation.measures import ReadTexts
from steersman.evaluation.tasks.item import Behaviour, Item, Task
from steersman.evaluation.tasks.registry import task_form
from steersman.evaluation.tasks.rows import read_rows
from steersman.pairs import read_text

PIECE = 1000
"""Characters after which a piece ends with its line, so that pieces have about as many tokens each."""

READING = Behaviour(
    "Reading plain text",
    "gives plain text its probability",
    "",
    "",
    Unjudged(),
    ReadTexts(),
)


@task_form("text", "a text file: negative log-likelihood (log perplexity), and KL to the unsteered model")
def text(place: str, *, limit: int | None) -> Task:
    """A text file in pieces of whole lines, about 1000 characters each; of .jsonl each row's `text`."""
    path = Path(place)
    pieces: Iterable[str]
    if path.suffix.lower() != ".jsonl" and path.is_file():
        pieces = filter(None, _pieces(read_text(path)))
    else:
        pieces = (
            row.text("text") for row in read_rows(place, "a text file, or JSON lines with a field text")
        )
    numbered = enumerate(islice(pieces, limit), 1)
    items = [Item(str(number), str(number), piece, "", None, "") for number, piece in numbered]
    if not items:
        raise PairsError(f"{place}: no text in it")
    return Task(f"text:{place}", items, READING)


def _pieces(whole: str) -> Iterator[str]:
    """Pieces of whole lines; a line much longer than a piece is cut between words."""
    piece = ""
    for line in whole.splitlines(keepends=True):
        while len(line) > 2 * PIECE and " " in line[PIECE:]:
            at = line.index(" ", PIECE)
            yield (piece + line[:at]).strip()
            piece, line = "", line[at:]
        piece += line
        if len(piece) >= PIECE:
            yield piece.strip()
            piece = ""
    if piece.strip():
        yield piece.strip()
