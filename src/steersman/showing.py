"""How objects show themselves: in one line; in a notebook with the tables that `show` prints."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 240
"""Signs of a line."""

SHOWN = 20
"""Rows of a table that has very many."""

Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""(header, rows)"""


def on_one_line(value: Any) -> Any:
    """A text, or JSON data with every text in it, keys too, on a line that it cannot leave or act in: line
    breaks, escape sequences and other control characters as Python escapes them.
    """
    if isinstance(value, str):
        return "".join(
            sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in value
        )
    if isinstance(value, Mapping):
        return {on_one_line(key): on_one_line(entry) for key, entry in value.items()}
    return [on_one_line(entry) for entry in value] if isinstance(value, list | tuple) else value


def cut(text: object, longest: int = 60) -> str:
    """The beginning of a text, in one line."""
    line: str = on_one_line(" ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def count_of(number: int, one: str, many: str = "") -> str:
    """A number of things: "1 pair", "2 pairs", "0 pairs"; `many` where the plural is not `one` and an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "0–11, 14"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def first_of(header: Sequence[str], rows: Sequence[Sequence[object]], count: int) -> Table:
    """A table of the first rows of so many, with a last one that says how many are left out."""
    left = count - len(rows)
    return header, [*rows, (f"… {left} more", *("" for _ in header[1:]))] if left > 0 else rows


def first_rows(frame: Any) -> Table:
    """The first rows of a pandas.DataFrame, numbers to three digits."""
    rows = [
        [f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row]
        for row in frame.head(SHOWN).itertuples(index=False)
    ]
    return first_of(list(frame.columns), rows, len(frame))


class Shown:
    """An object that says in one line what it is."""

    def in_words(self) -> str:
        """What it is, in one line."""
        raise NotImplementedError

    def as_tables(self) -> Sequence[Table]:
        """What is in it, for people: (header, rows) of each table."""
        return ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {cut(self.in_words(), LONGEST)}>"

    def _repr_html_(self) -> str:
        return "".join([f"<p>{html.escape(repr(self))}</p>", *map(_in_html, self.as_tables())])


def _in_html(table: Table) -> str:
    header, rows = table
    lines = [_row(header, "th"), *(_row(row, "td") for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(cells: Sequence[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
