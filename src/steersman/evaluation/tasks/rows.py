"""Rows of a data set: of a file in its published form, or of the `datasets` library; and their fields."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from steersman.errors import PairsError, how_to_install
from steersman.evaluation.tasks.asking import asked
from steersman.evaluation.tasks.item import Item
from steersman.pairs import Content, check_content, parse_json, read_text
from steersman.stand_ins import annex_link

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
LIBRARY_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
SPLITS = ("test", "validation", "train")
"""Of which the first that a data set has is read, where none is named."""


@dataclass(frozen=True)
class Row:
    """One row's fields, and where it stands, for messages."""

    fields: Mapping[str, Any]
    where: str

    def error(self, what: str) -> PairsError:
        """What is wrong with this row."""
        return PairsError(f"{self.where}: {what}")

    def has(self, *names: str) -> bool:
        """Whether one of the fields is there and is neither null nor an empty cell."""
        return any(self.fields.get(name) not in (None, "") for name in names)

    def text(self, *names: str) -> str:
        """The first of the fields that is there. Raises PairsError where none is, or it is no words."""
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            raise self.error(f'"{names[0]}" is missing; there are {", ".join(self.fields) or "no fields"}')
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f'"{name}" is {value!r:.40}; right is a text')
        if not value.strip():
            raise self.error(f'"{name}" is empty')
        return value

    def label(self, *names: str) -> str:
        """The first of the fields that is there, a text or a whole number; "" where none is."""
        for name in names:
            value = self.fields.get(name)
            if value not in (None, ""):
                if isinstance(value, bool) or not isinstance(value, str | int):
                    raise self.error(f'"{name}" is {value!r:.40}; right is a text or a whole number')
                return str(value)
        return ""

    @property
    def number(self) -> str:
        """Its place in the file, as an id for rows that have none."""
        return re.split(r"[:/ ]", self.where)[-1]

    def content(self, *prompts: str) -> Content:
        """What the model is to answer: `messages` as they are, a `text` to go on with, or one of the fields
        `prompts` as a user's message.
        """
        given = [name for name in ("messages", "text", *prompts) if self.has(name)]
        if len(given) > 1:
            raise self.error(f'both "{given[0]}" and "{given[1]}"; right is one of them')
        if given == ["messages"]:
            content: Content = self.fields["messages"]
            check_content(content, f'{self.where}: "messages"')
            if isinstance(content, str) or content[-1]["role"] not in ("user", "tool"):
                raise self.error('"messages" must end with the user\'s, for the model to answer')
            return content
        return self.text("text") if given == ["text"] else asked(self.text(*prompts))

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that holds one text or several, at least one."""
        value = self.fields.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            raise self.error(
                f'"{name}" is {"missing" if value is None else repr(value)[:40]}; right is a text or texts'
            )
        return tuple(Row({name: one}, self.where).text(name) for one in values)


def read_rows(place: str, example: str, *, config: str | None = None) -> Iterator[Row]:
    """The rows of a file (CSV, TSV, JSON, JSON lines, Parquet), or of a data set by its name.

    A name is that of the library `datasets`: `NAME[:CONFIG][@SPLIT]`, or a folder that it reads. Code of a
    data set is never run.

    Args:
        place: The file, or the name.
        example: What would be right, for messages.
        config: Of a name that says none.

    Raises PairsError that names file and line.
    """
    path = Path(place)
    if not place.strip():
        raise PairsError(f"a task's file is missing; right is {example}")
    found: Iterable[Row]
    if path.is_file():
        found = _of_file(path)
    elif path.suffix.lower() in SUFFIXES or (place.startswith((".", "/", "~")) and not path.is_dir()):
        raise PairsError(f"{place}: {annex_link(path) or 'no such file'}; right is {example}")
    else:
        found = _of_library(place, config)
    empty = True
    for row in found:
        empty = False
        yield _sound(row)
    if empty:
        raise PairsError(f"{place}: no rows in it; right is {example}")


def items_of(rows: Iterable[Row], make: Callable[[Row], Item | None], limit: int | None) -> list[Item]:
    """The first `limit` items of rows; rows of which none is made are passed over.

    Raises PairsError where an id is given twice.
    """
    seen: dict[str, str] = {}

    def made() -> Iterator[Item]:
        for row in rows:
            item = make(row)
            if item is not None:
                if item.id in seen:
                    raise row.error(f'the id "{item.id}" was already given at {seen[item.id]}')
                seen[item.id] = row.where
                yield item

    return list(islice(made(), limit))


def _of_file(path: Path) -> Iterable[Row]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _of_csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _of_parquet(path)
    return _of_json(path)


def _of_csv(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(header):
                raise PairsError(f"{path}:{start}: {len(cells)} cells under {len(header)} columns")
            elif cells:
                yield Row(dict(zip(header, cells, strict=True)), f"{path}:{start}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise PairsError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _of_json(path: Path) -> Iterator[Row]:
    """Of JSON lines, or of one JSON value over the whole file: a list, {"data": list}, or one object."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".json" and lines:
        whole = _whole(path, text)
        if whole is not None:
            return whole
    return (_object(_parsed(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines)


def _whole(path: Path, text: str) -> Iterator[Row] | None:
    """None where the file is not one JSON value but may be JSON lines, whatever its name."""
    try:
        value = parse_json(text)
    except ValueError as error:
        try:
            parse_json(text.lstrip().partition("\n")[0])
        except ValueError:
            raise PairsError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({_reason(error)})") from None
        return None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    values = value if isinstance(value, list) else [value]
    return (_object(one, f"{path}: item {number}") for number, one in enumerate(values, 1))


def _of_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PairsError(f"{path}: cannot be read as Parquet ({_reason(error)})") from None
    for number, fields in enumerate(table.to_pylist(), 1):
        yield Row(fields, f"{path}: row {number}")


def _of_library(place: str, config: str | None) -> Iterator[Row]:
    parts = LIBRARY_NAME.fullmatch(place)
    name = place if parts is None or Path(place).is_dir() else parts["name"]
    if parts is None and not Path(place).is_dir():
        raise PairsError(f"{place}: no such file, and no name of a data set (NAME[:CONFIG][@SPLIT])")
    chosen = config if parts is None or name == place else parts["config"] or config
    try:
        import datasets
    except ImportError:
        raise PairsError(
            f"{place}: no such file; data sets by their names need the library datasets; "
            f"{how_to_install('tasks')}"
        ) from None
    try:
        split = parts["split"] if parts is not None and name != place else None
        if split is None:
            splits = datasets.get_dataset_split_names(name, chosen)
            split = next((known for known in SPLITS if known in splits), splits[0])
        data = datasets.load_dataset(name, chosen, split=split)
    except Exception as error:  # its own, the Hub's, and the network's are of many classes
        raise PairsError(
            f"{place}: the data set cannot be had ({_reason(error)}); right is a file, or a name that the "
            "library datasets can load"
        ) from None
    for number, fields in enumerate(data, 1):
        yield Row(dict(fields), f"{place}@{split}: row {number}")


def _parsed(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise PairsError(f"{where}: not JSON ({_reason(error)}); right is one object a line") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise PairsError(f"{where}: {repr(value)[:40]} where an object with fields is expected")
    return Row(value, where)


def _sound(row: Row) -> Row:
    for name, value in row.fields.items():
        if (flaw := _flaw(value)) is not None:
            raise row.error(f'"{name}" holds {flaw}')
    return row


def _flaw(value: Any) -> str | None:
    """What neither a tokenizer nor a JSON file could take, anywhere in a field."""
    if isinstance(value, Mapping | list):
        inner = [*value, *value.values()] if isinstance(value, Mapping) else value
        return next((flaw for flaw in map(_flaw, inner) if flaw is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinity, which is no number"
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        return "half a character (a lone surrogate)"
    return None


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
