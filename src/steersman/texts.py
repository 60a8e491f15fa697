"""Texts of the user's to read a model with: reading them from a file, from the lab, or from Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from steersman.errors import PairsError, valid_name
from steersman.pairs import Content, check_content, check_rows, parse_json, read_text
from steersman.steering import sha256_of

RIGHT = 'right is one text a line: a text, {"text": text} or {"messages": [...]}'
_JSON_FILES = (".jsonl", ".json")


@dataclass(frozen=True)
class Text:
    """A text or a chat, where it was found, and the group of pairs that it is a prompt of, if it is one."""

    content: Content
    where: str
    group: str | None = None


class Texts(Sequence[Text]):
    """Texts in order, with a name for messages and a hash of what they say. Raises PairsError for none."""

    def __init__(self, items: Iterable[Text], name: str = "texts") -> None:
        self.name = name
        self._items = tuple(items)
        if not self._items:
            raise PairsError(f"{name}: no texts in it; {RIGHT}")

    @property
    def sha256(self) -> str:
        """Hex sha256 over canonical JSON of the contents."""
        return sha256_of([text.content for text in self._items])

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> Text | Texts:
        return Texts(self._items[index], self.name) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)


def load_texts(source: str | Path | Iterable[str | Mapping[str, Any] | list[dict[str, str]]]) -> Texts:
    """Read texts from a file, from the lab, or from Python.

    Files have one a line: the text itself, `{"text": text}` or `{"messages": [{"role", "content"}, …]}`; in
    `.jsonl` and `.json` every line is JSON. The lab: `"lab:texts/train"`, or `"lab:refusal/train"`, both
    sides of its pairs, each once (`train` where no split is named). In Python: texts, chats, or the objects
    of a file.

    Raises PairsError that names file and line.
    """
    if isinstance(source, Texts):
        return source
    if isinstance(source, str) and source.startswith("lab:"):
        return Texts(_of_lab(source), source)
    if isinstance(source, str | Path):
        return Texts(_of_file(Path(valid_name(source, PairsError)), str(source)), str(source))
    check_rows(source, "texts", RIGHT)
    return Texts((Text(_content(value, f"text {n}"), f"text {n}") for n, value in enumerate(source, 1)))


def _of_lab(source: str) -> Iterator[Text]:
    from steersman import lab

    name, _, split = source.removeprefix("lab:").partition("/")
    if name == "texts":
        for number, chat in enumerate(lab.texts(split or "train"), 1):
            yield Text(chat, f"{source}:{number}")
        return
    seen: set[str] = set()
    for number, row in enumerate(lab.pairs(name, split or "train"), 1):
        for side in ("positive", "negative"):
            if (key := sha256_of(row[side])) not in seen:
                seen.add(key)
                yield Text(row[side], f"{source}:{number}")


def _of_file(path: Path, name: str) -> Iterator[Text]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{name}:{number}"
            yield Text(_line(line.strip(), where, must_be_json=path.suffix.lower() in _JSON_FILES), where)


def _line(line: str, where: str, *, must_be_json: bool) -> Content:
    try:
        value = parse_json(line)
    except ValueError as error:
        if must_be_json or not isinstance(error, json.JSONDecodeError):
            raise PairsError(f"{where}: not JSON ({error}); {RIGHT}") from None
        value = line
    # A line that happens to be JSON, such as a number, is a text in a file of texts.
    return _content(value if isinstance(value, dict) or must_be_json else line, where)


def _content(value: Any, where: str) -> Content:
    if isinstance(value, Mapping):
        if len(value) != 1 or not {"text", "messages"} & set(value):
            raise PairsError(f"{where}: the keys are {', '.join(map(str, value)) or 'none'}; {RIGHT}")
        key, content = next(iter(value.items()))
        if isinstance(content, str) != (key == "text"):
            raise PairsError(f"{where}: {RIGHT}")
        value = content
    if not isinstance(value, str | list) or value == []:
        raise PairsError(f"{where}: neither a text nor messages; {RIGHT}")
    if isinstance(value, str) and not value.strip():
        raise PairsError(f"{where} is empty; {RIGHT}")
    content = value
    check_content(content, where)
    return content
