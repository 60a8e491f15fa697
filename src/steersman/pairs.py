"""Contrast pairs: every form in which they are read, and what is wrong with a file of them."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, overload

from tqdm import tqdm

from steersman.errors import PairsError, each_of, told, valid_name
from steersman.showing import SHOWN, Shown, Table, count_of, cut, first_of
from steersman.stand_ins import HEAD, annex_link, stand_in
from steersman.steering import canonical_json, sha256_of

Content = str | list[dict[str, str]]
"""A text, or chat messages ``{"role": …, "content": …}``."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_FORMS = (
    '{"positive": …, "negative": …}, {"messages_0": …, "messages_1": …}, {"prompt": …, "chosen": …, '
    '"rejected": …}, {"pos": […], "neg": […]} or [positive, negative] (optional: targets, id, group)'
)


@dataclass(frozen=True, repr=False)
class ContrastPair(Shown):
    """Two chats or texts that show the two sides of a behaviour.

    ``positive_target`` and ``negative_target`` are the parts whose tokens are compared (None: see `encode`);
    ``group`` names what the pair shares with others (a document, a template); ``where`` names its source in
    messages; ``plain`` are a question and its answers that were given as texts, which go through no chat
    template. Raises PairsError where a side cannot be used.

    Example:
        >>> steersman.ContrastPair("i am kind", "i am cruel", positive_target="kind", negative_target="cruel")
        <ContrastPair: pair: i am kind / i am cruel>
    """

    positive: Content
    negative: Content
    positive_target: str | None = None
    negative_target: str | None = None
    id: str = ""
    group: str | None = None
    where: str = "pair"
    plain: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            check_content(getattr(self, side), f'{self.where}: "{side}"', "a pair has two sides")
            target = getattr(self, f"{side}_target")
            if target is not None:
                _check_text(target, f'{self.where}: "{side}_target"', "leave it out for the default target")
        if isinstance(self.positive, str) != isinstance(self.negative, str):
            raise PairsError(
                f"{self.where}: one side is a text and the other a chat, so they differ in form too; "
                "right are two texts or two chats"
            )
        if self.group is not None:
            _check_text(self.group, f'{self.where}: "group"', "leave it out for a pair of its own")
        if (self.positive, self.positive_target) == (self.negative, self.negative_target):
            raise PairsError(f"{self.where}: both sides are the same, so there is nothing to compare")

    @property
    def cluster(self) -> str:
        """What is statistically one unit: the group, else a sha256 of the pair's own content."""
        return self.group if self.group is not None else sha256_of(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "positive": self.positive,
            "negative": self.negative,
            "positive_target": self.positive_target,
            "negative_target": self.negative_target,
        }

    def in_words(self) -> str:
        """Where it is from, and how its sides begin; of chats from where they differ."""
        return f"{cut(self.where)}: {' / '.join(map(cut, self.differing()))}"

    def differing(self) -> tuple[Content, Content]:
        """Both sides; of chats from the first message in which they differ."""
        one, other = self.positive, self.negative
        if isinstance(one, str) or isinstance(other, str):
            return one, other
        same = itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))
        begin = sum(1 for _ in same)
        return one[begin:], other[begin:]


class ContrastPairs(Shown, Sequence[ContrastPair]):
    """Contrast pairs in order, with a name for messages and a hash of what they say.

    Raises PairsError where there is none, or an id is given twice.

    Example:
        >>> steersman.ContrastPairs([steersman.ContrastPair("i am kind", "i am cruel")], name="by hand")
        <ContrastPairs: 1 pair from by hand>
    """

    def __init__(self, items: Iterable[ContrastPair], name: str = "pairs") -> None:
        self.name = name
        # A file's pairs stay in the file, and have been looked through.
        self._items = items if isinstance(items, _PairsOfFile) else tuple(_with_unique_ids(items))
        if not self._items:
            raise PairsError(f"{name}: no pairs in it; right is at least one {_FORMS}")

    @property
    def sha256(self) -> str:
        """Hex sha256 over canonical JSON of sides, targets and groups; neither ids nor file names count."""
        digest = hashlib.sha256(b"[")
        for number, pair in enumerate(self._items):
            content = canonical_json({**pair._content(), "group": pair.group})
            digest.update(f"{',' if number else ''}{content}".encode())
        digest.update(b"]")
        return digest.hexdigest()

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> ContrastPairs: ...
    def __getitem__(self, index: int | slice) -> ContrastPair | ContrastPairs:
        if isinstance(index, slice):
            return ContrastPairs(self._items[index], name=self.name)
        return self._items[index]

    def __iter__(self) -> Iterator[ContrastPair]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def in_words(self) -> str:
        """How many there are, from where."""
        return f"{count_of(len(self), 'pair')} from {self.name}"

    def as_tables(self) -> list[Table]:
        """The first pairs, each side from where they differ."""
        rows = [
            (pair.id or n, pair.group or "", *map(cut, pair.differing()))
            for n, pair in enumerate(self[:SHOWN], 1)
        ]
        return [first_of(("pair", "group", "positive", "negative"), rows, len(self))]


def _with_unique_ids(pairs: Iterable[ContrastPair]) -> Iterator[ContrastPair]:
    seen: dict[str, str] = {}
    for pair in pairs:
        if pair.id:
            if pair.id in seen:
                raise PairsError(f'{pair.where}: the id "{pair.id}" was already given at {seen[pair.id]}')
            seen[pair.id] = pair.where
        yield pair


# ---------------------------------------------------------------------------------------------------- reading


Rows = Iterable[Mapping[str, Any] | Sequence[Any]]
"""Rows in Python: a list, a generator, a `datasets.Dataset`; of objects or of (positive, negative)."""


def load_pairs(source: str | Path | Rows, *, progress: bool = False) -> ContrastPairs:
    """Read contrast pairs from a file, from the lab, or from rows already in Python.

    Files: JSON lines, a JSON array or one JSON object, of ``{"positive", "negative"}`` with optional
    ``positive_target``, ``negative_target``, ``id`` and ``group``; of SteerMoE's ``messages_0`` (positive)
    and ``messages_1``; of preferences, ``{"prompt", "chosen", "rejected"}``, whose other columns are not read
    (a warning names them); of ``[positive, negative]``; or of ``{"pos": […], "neg": […]}``; or CSV with such
    columns. The lab: ``"lab:refusal/train"`` (``train`` where no split is named). Rows: the same objects, or
    tuples ``(positive, negative)``; whatever gives them is gone through once. Raises PairsError that names
    file and line.

    Of JSON lines with a pair each every line is checked, and read again when its pair is asked for: memory
    holds a number a line. Of the other forms it holds the pairs. ``progress`` shows a bar on stderr where
    checking them takes more than a second.

    Example:
        >>> steersman.load_pairs([("i am kind", "i am cruel"), ("i love you", "i hate you")])
        <ContrastPairs: 2 pairs from pairs>
    """
    if isinstance(source, ContrastPairs):
        return source
    if isinstance(source, str) and source.startswith("lab:"):
        return _read_lab(source)
    if isinstance(source, str | Path):
        path = Path(valid_name(source, PairsError))
        if path.suffix.lower() == ".csv":
            return _assemble(_csv_rows(path), str(source))
        return _open_json(path, str(source), progress)
    check_rows(source, "pairs", f"right is {_FORMS}")
    return _assemble(((_without_nulls(row), f"pair {n}") for n, row in enumerate(source, 1)), "pairs")


def check_rows(source: object, what: str, right: str) -> None:
    """Raise PairsError for what, in Python, does not give rows one by one; `right` says what does."""
    if isinstance(source, Mapping):
        parts = ", ".join(map(str, source))
        raise PairsError(
            f"{what}: {_kind(source)} with {parts or 'nothing'}; right is a list of rows, or one part of "
            "data that has several (data['train'])"
        )
    for name, call in _ROWS_OF_TABLES.items():
        if hasattr(source, "columns") and hasattr(source, name):
            raise PairsError(
                f"{what}: a {type(source).__name__} gives its columns one by one, not its rows; right are "
                f"its rows, as {call} gives them"
            )
    if not isinstance(source, Iterable):
        raise PairsError(f"{what}: {_kind(source)} where rows are expected; {right}")


_ROWS_OF_TABLES = {
    "to_dicts": "table.to_dicts()",
    "to_pylist": "table.to_pylist()",
    "to_dict": "table.to_dict('records')",
}
"""How tables give their rows, by the method that tells polars', pyarrow's and pandas' apart."""


def _without_nulls(row: Any) -> Any:
    """A row without what tables fill in where a message or a row has no value."""
    if isinstance(row, Mapping):
        return {key: _without_nulls(value) for key, value in row.items() if value is not None}
    return [_without_nulls(item) for item in row] if isinstance(row, list | tuple) else row


def persona_pairs(
    template: str,
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    suffixes: Iterable[str] = (),
    *,
    chat: bool = True,
) -> ContrastPairs:
    """Contrast pairs of two personas who begin the same answers: what a concept is refined from.

    Representation engineering's way to pairs (RepE, arXiv 2310.01405, section 3.1): either side asks for its
    persona, and both go on with the same words, so that what differs at the last token is the persona.
    Pairs with one suffix are a group.

    Args:
        template: What asks for a persona, at ``{persona}``: ``"Pretend you are a {persona} person."``
        positive: The persona, or several.
        negative: The other one; of several, the partner of each.
        suffixes: How answers begin; with none, what is read is where an answer is about to begin.
        chat: The template is the user's message and the suffix the assistant's; False: both are one text.

    Raises:
        PairsError: the template has no place for the persona, the personas have no partners, or a pair's
            sides are the same.

    Example:
        >>> steersman.persona_pairs("Act as a {persona} person.", "kind", "cruel", ["I think", "People"])
        <ContrastPairs: 2 pairs from persona pairs>
    """
    ours, theirs = (
        each_of([of] if isinstance(of, str) else of, str, PairsError) for of in (positive, negative)
    )
    if not isinstance(template, str) or "{persona}" not in template:
        raise PairsError(f"the template {told(template)} has no place for the persona: {{persona}}")
    if len(ours) != len(theirs):
        raise PairsError(f"{len(ours)} positive personas and {len(theirs)} negative: right is a partner each")

    def side(persona: str, suffix: str | None) -> Content:
        asked = template.replace("{persona}", persona)
        if not chat:
            return asked if suffix is None else f"{asked} {suffix}"
        begun = [] if suffix is None else [{"role": "assistant", "content": suffix}]
        return [{"role": "user", "content": asked}, *begun]

    given = [suffixes] if isinstance(suffixes, str) else () if suffixes is None else suffixes
    begins: list[str | None] = [*each_of(given, str, PairsError)]
    return ContrastPairs(
        (
            ContrastPair(
                side(one, suffix),
                side(other, suffix),
                group=suffix,
                where=f"{one} and {other}" + ("" if suffix is None else f", {json.dumps(suffix)}"),
            )
            for one, other in zip(ours, theirs, strict=True)
            for suffix in begins or [None]
        ),
        name="persona pairs",
    )


def _read_lab(source: str) -> ContrastPairs:
    from steersman import lab

    name, _, split = source.removeprefix("lab:").partition("/")
    rows = lab.pairs(name, split or "train")
    return _assemble(((row, f"{source}:{n}") for n, row in enumerate(rows, 1)), source)


def _assemble(rows: Iterable[tuple[Any, str]], name: str) -> ContrastPairs:
    return ContrastPairs(_pairs_of(rows, name), name=name)


def _pairs_of(rows: Iterable[tuple[Any, str]], name: str) -> Iterator[ContrastPair]:
    """Rows with their places, in any one of the known forms, as pairs; a warning names what is not read."""
    form = first_where = None
    unread: dict[str, None] = {}
    for row, where in rows:
        own_form, pairs, more = _read(row, where)
        unread |= dict.fromkeys(more)
        if form is None:
            form, first_where = own_form, where
        elif own_form != form:
            raise PairsError(
                f'{where}: a row of the form with "{own_form}" after rows with "{form}" '
                f"(from {first_where}); right is one form throughout"
            )
        yield from pairs
    if unread:
        warnings.warn(f"{name}: not read of its columns: {', '.join(unread)}", stacklevel=1)


def _read(row: Any, where: str) -> tuple[str, Iterable[ContrastPair], list[str]]:
    """A row's form, by the key of its positive side, its pairs, and the keys that are not read; missing keys
    are errors, and unknown ones but of preferences.
    """
    if isinstance(row, list | tuple) and len(row) == 2:
        row = dict(zip(("positive", "negative"), row, strict=True))
    if not isinstance(row, Mapping):
        raise PairsError(f"{where}: {_kind(row)} where a pair is expected; right is {_FORMS}")
    form = _form_with(row)
    if form is None:
        raise PairsError(f"{where}: neither side of a pair in it; right is {_FORMS}")
    unknown = sorted(str(key) for key in row if key not in form.keys)
    mistaken = [key for key in unknown if not form.open or any(key in other.keys for other in _TABLE)]
    if mistaken:
        raise PairsError(f'{where}: unknown key "{mistaken[0]}"; right are {", ".join(form.keys)}')
    for side in form.sides:
        if side not in row:
            there = f", and there is {', '.join(json.dumps(key) for key in unknown)}" if unknown else ""
            raise PairsError(f'{where}: "{side}" is missing{there}; a pair has both sides')
    if lost := next((key for key in unknown if _says_what_is_asked(row, key)), None):
        raise PairsError(
            f'{where}: "{lost}" says what the model is asked, and would not be read; right is "prompt", as a '
            'text or as messages ({"role": "system", …}, {"role": "user", …})'
        )
    return form.sides[0], form.pairs(row, where), unknown


def _says_what_is_asked(row: Mapping[str, Any], key: str) -> bool:
    """Whether the model would be asked with a column that is not read."""
    whole = row.get("prompt") is not None or _has_question(row["chosen"])
    value = row.get(key)
    empty = len(value) == 0 if isinstance(value, Sized) else value is None or value is False
    nothing = empty or (isinstance(value, float) and math.isnan(value))  # as tables say that there is none
    return not nothing and (key in _ASKED_BESIDE or (key in _ASKED and not whole))


def _has_question(content: Any) -> bool:
    """Whether messages say what the model is asked."""
    messages = content if isinstance(content, list) else []
    return any(isinstance(message, Mapping) and message.get("role") == "user" for message in messages)


def _pair_of_row(row: Mapping[str, Any], where: str) -> list[ContrastPair]:
    fields = dict(row)
    for key in ("id", "group"):
        fields[key] = _label(fields.get(key), f'{where}: "{key}"')
    return [ContrastPair(**{**fields, "id": fields["id"] or "", "where": where})]


def _pair_of_steermoe(row: Mapping[str, Any], where: str) -> list[ContrastPair]:
    names = {"messages_0": "positive", "messages_1": "negative"}
    names |= {f"{key}_target": f"{name}_target" for key, name in names.items()}
    return _pair_of_row({names.get(key, key): value for key, value in row.items()}, where)


def _pair_of_preferences(row: Mapping[str, Any], where: str) -> list[ContrastPair]:
    """Of DPO's rows: chosen is positive, and the answers are compared.

    Texts go on from the prompt's text as they are, messages from its messages (which they may repeat); a
    text beside messages is the user's (as prompt) or the assistant's (as answer). Without a prompt either
    side is whole, and what texts have in common is their prompt (as TRL reads preferences).
    """
    named = {key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    for key in ("prompt", "chosen", "rejected"):
        if key in named or key != "prompt":
            absent = "leave it out instead" if key == "prompt" else "a pair has two sides"
            check_content(row[key], f'{where}: "{key}"', absent)
    chosen, rejected = row["chosen"], row["rejected"]
    if (prompt := named.pop("prompt", None)) is not None:
        chat = any(not isinstance(content, str) for content in (prompt, chosen, rejected))
        sides = [_answered(prompt, said, chat, f'{where}: "{key}"') for key, said in named.items()]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        shared = range(shared_length(chosen, rejected), 0, -1)
        start = next((n for n in shared if chosen[n - 1].isspace()), 0)  # words stay whole
        sides = [(chosen, chosen[start:]), (rejected, rejected[start:])]
    else:
        sides = [(chosen, None), (rejected, None)]
    for key, (content, target) in zip(("chosen", "rejected"), sides, strict=True):
        if not isinstance(content, str) and content[-1]["role"] != "assistant":
            raise PairsError(
                f'{where}: "{key}" ends with a message of the role {content[-1]["role"]}; right is an answer '
                "of the assistant"
            )
        if target is not None and not target.strip():
            raise PairsError(f'{where}: "{key}" is only the beginning of the other, so it has no answer')
    (positive, positive_target), (negative, negative_target) = sides
    rest = {key: row.get(key) for key in ("id", "group")}
    targets = {"positive_target": positive_target, "negative_target": negative_target}
    rest["plain"] = isinstance(positive, str)
    return _pair_of_row({"positive": positive, "negative": negative, **targets, **rest}, where)


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common beginning."""
    items = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in items if one != other), min(len(first), len(second)))


def _answered(prompt: Content, answer: Content, chat: bool, where: str) -> tuple[Content, str | None]:
    """A prompt with an answer after it, as a chat or a text, and the target; None where the last message is
    it. Raises PairsError where the answer begins with another prompt.
    """
    if not chat:
        return f"{prompt}{answer}", str(answer)
    asked, said = _as_messages(prompt, "user"), _as_messages(answer, "assistant")
    if len(said) > len(asked) and _bare(said[: len(asked)]) == _bare(asked):
        return said, None
    first = said[0]["role"]
    if first in ("system", "developer") or first == asked[-1]["role"] == "user":
        raise PairsError(
            f'{where} begins with a message of the role {first} that is not the "prompt"; right is '
            'an answer alone, or the chat from "prompt" on'
        )
    return [*asked, *said], None


def _as_messages(content: Content, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _bare(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Messages without whitespace at their ends, which templates take away."""
    return [(message["role"], message["content"].strip()) for message in messages]


def _pairs_of_lists(row: Mapping[str, Any], where: str) -> Iterator[ContrastPair]:
    positives, negatives = row["pos"], row["neg"]
    for key, side in (("pos", positives), ("neg", negatives)):
        if not isinstance(side, list):
            raise PairsError(f'{where}: "{key}" is {_kind(side)}; right is a list of texts or of chats')
        if any(isinstance(item, Mapping) for item in side):
            raise PairsError(
                f'{where}: "{key}" holds messages directly; '
                'a single chat is written {"positive": [messages], "negative": [messages]}'
            )
    if len(positives) != len(negatives):
        raise PairsError(
            f'{where}: "pos" has {len(positives)} items and "neg" {len(negatives)}; right is one partner each'
        )
    for n, (positive, negative) in enumerate(zip(positives, negatives, strict=True), 1):
        yield ContrastPair(positive, negative, where=f"{where}, item {n}")


@dataclass(frozen=True)
class _Form:
    """A form of rows: the keys of its two sides, other keys, and what makes pairs of a row."""

    sides: tuple[str, str]
    others: tuple[str, ...]
    pairs: Callable[[Mapping[str, Any], str], Iterable[ContrastPair]]
    many: bool = False
    """Whether a row has many pairs, so that reading one reads them all."""
    open: bool = False
    """Whether data sets of this form have columns of their own beside, which are not read."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them, in the order in which messages name them."""
        return (*self.sides, *self.others)


_TABLE = (
    _Form(("positive", "negative"), ("positive_target", "negative_target", "id", "group"), _pair_of_row),
    _Form(
        ("messages_0", "messages_1"),
        ("messages_0_target", "messages_1_target", "id", "group"),
        _pair_of_steermoe,
    ),
    _Form(("chosen", "rejected"), ("prompt", "id", "group"), _pair_of_preferences, open=True),
    _Form(("pos", "neg"), (), _pairs_of_lists, many=True),
)
"""Every form that rows can have."""

_ASKED_BESIDE = frozenset(
    {"system", "system_prompt", "history", "tools", "documents", "image", "images", "videos", "audios"}
)
_ASKED = frozenset(
    {"question", "instruction", "input", "query", "context", "conversation", "conversations", "messages"}
)
"""Columns of preferences that the model would be asked with, beside a prompt or in its place."""


def _form_with(keys: Collection[str]) -> _Form | None:
    """The form that has one of these keys for a side."""
    return next((form for form in _TABLE if set(form.sides) & set(keys)), None)


def _label(value: Any, where: str) -> str | None:
    """An id or a group: a text or a whole number; None where it is not given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PairsError(f"{where} is {_kind(value)}; right is a text or a whole number")
    if not str(value).strip():
        raise PairsError(f"{where} is empty; leave it out instead")
    return str(value)


def _open_json(path: Path, name: str, progress: bool) -> ContrastPairs:
    """Pairs of JSON lines, of a JSON array, or of one JSON object written over many lines."""
    with _opened(path) as stream:
        first = next(_lines(stream, path), None)
    if first is None:
        raise PairsError(f"{path}: the file is empty; right is one pair a line, {_FORMS}")
    try:
        row = parse_json(first.text)
    except ValueError:
        # A first line that is no JSON of its own begins a value written over many lines, or is wrong.
        if first.text.lstrip().startswith("["):
            return _assemble(_array_rows(path, read_text(path)), name)
        return _assemble([_whole_file(path, read_text(path), first.number, first.text)], name)
    if isinstance(row, list) and not (len(row) == 2 and all(map(_is_side, row))):
        return _assemble(_array_rows(path, read_text(path)), name)
    if isinstance(row, Mapping) and (form := _form_with(row)) is not None and form.many:
        with _opened(path) as stream:
            return _assemble((_row(path, line) for line in _lines(stream, path)), name)
    return ContrastPairs(_PairsOfFile(path, progress), name=name)


def _is_side(value: Any) -> bool:
    """Whether a value can be a side of a pair, and so no row."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value)
    )


def _array_rows(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    """The items of a JSON array, each with the line on which it begins."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    place, number, sign = text.index("["), 0, "["
    while sign != "]":
        place = _next_sign(text, place + 1)
        if sign == "[" and text[place : place + 1] == "]":
            break
        line, number = text.count("\n", 0, place) + 1, number + 1
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            reason = _reason(error) if isinstance(error, ValueError) else "nested too deeply"
            raise PairsError(f"{path}:{line}: not JSON ({reason}); right is a list of {_FORMS}") from None
        yield row, f"{path}:{line}, row {number}"
        place = _next_sign(text, place)
        sign = text[place : place + 1]
        if sign not in (",", "]") or not sign:
            raise PairsError(f"{path}:{line}: after row {number} a comma, or the list's end, is missing")
    if text[place + 1 :].strip():
        line = text.count("\n", 0, place) + 1
        raise PairsError(f"{path}:{line}: more text after the list; right is one list, or a pair a line")


def _next_sign(text: str, place: int) -> int:
    """Where, from a place on, a text has something other than whitespace."""
    return len(text) - len(text[place:].lstrip())


@dataclass(frozen=True)
class _Line:
    """A line that is not blank: its number from 1, the byte where it begins, its text."""

    number: int
    start: int
    text: str


def _lines(stream: BinaryIO, path: Path) -> Iterator[_Line]:
    # By \n alone, as JSON strings may hold U+2028 and the like as they are.
    start = 0
    for number, content in enumerate(stream, 1):
        text = _decoded(content, start, path)
        if text.strip():
            yield _Line(number, start, text)
        start += len(content)


def _decoded(content: bytes, start: int, path: Path) -> str:
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark in front.
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairsError(
            f"{path}: not UTF-8 (byte {start + error.start}); right is a text file in UTF-8"
        ) from None


def _row(path: Path, line: _Line) -> tuple[Any, str]:
    try:
        return parse_json(line.text), f"{path}:{line.number}"
    except ValueError as error:
        raise PairsError(
            f"{path}:{line.number}: not JSON ({_reason(error)}); right is one object a line"
        ) from None


def _opened(path: Path) -> BufferedReader:
    try:
        stream = path.open("rb")
        if (instead := stand_in(stream.peek(HEAD)[:HEAD])) is not None:  # a pipe has no way back
            stream.close()
            raise PairsError(f"{path}: {instead}")
        return stream
    except FileNotFoundError:
        raise PairsError(f"{path}: {annex_link(path) or 'no such file'}") from None
    except IsADirectoryError:
        raise PairsError(f"{path}: is a folder; pairs are a file or lab:NAME") from None
    except (OSError, ValueError) as error:
        raise PairsError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _bar(size: int, shown: bool) -> tqdm[Any]:
    """Progress through a file of so many bytes, gone when it is read."""
    return tqdm(
        total=size, desc="reading", unit="B", unit_scale=True, delay=1, leave=False, disable=not shown
    )


class _PairsOfFile(Sequence[ContrastPair]):
    """Pairs of JSON lines, one a line: looked through once, and read again whenever they are asked for.

    Raises PairsError for a line that is wrong, and later where the file is no longer what it was.
    """

    def __init__(self, path: Path, progress: bool = False) -> None:
        self._path = path
        self._starts, self._numbers = array("q"), array("q")
        with _opened(path) as stream, _bar(path.stat().st_size, progress) as bar:
            self._stamp = _stamp(stream)
            for _ in _with_unique_ids(_pairs_of(self._rows(stream, bar), str(path))):
                pass

    def _rows(self, stream: BinaryIO, bar: tqdm[Any]) -> Iterator[tuple[Any, str]]:
        for line in _lines(stream, self._path):
            bar.update(line.start - bar.n)
            self._starts.append(line.start)
            self._numbers.append(line.number)
            yield _row(self._path, line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ContrastPair]: ...
    def __getitem__(self, index: int | slice) -> ContrastPair | Sequence[ContrastPair]:
        places = range(len(self))[index]
        with self._open_again() as stream:
            if isinstance(places, range):
                return [self._read(stream, place) for place in places]
            return self._read(stream, places)

    def __iter__(self) -> Iterator[ContrastPair]:
        with self._open_again() as stream:
            for place in range(len(self)):
                yield self._read(stream, place)

    def _open_again(self) -> BinaryIO:
        stream = _opened(self._path)
        if _stamp(stream) != self._stamp:
            stream.close()
            raise PairsError(f"{self._path}: was changed since it was first read; start again")
        return stream

    def _read(self, stream: BinaryIO, place: int) -> ContrastPair:
        start, number = self._starts[place], self._numbers[place]
        stream.seek(start)
        line = _Line(number, start, _decoded(stream.readline(), start, self._path))
        (pair,) = _read(*_row(self._path, line))[1]
        return pair


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _whole_file(path: Path, text: str, n: int, first_line: str) -> tuple[Any, str]:
    try:
        return parse_json(text), f"{path}:{n}"
    except ValueError as error:
        is_lines = path.suffix.lower() != ".json" and not isinstance(error, _DuplicateKey)
        line = n if is_lines else getattr(error, "lineno", n)
        reason = _reason(error) if not is_lines else _reason(_error_of(first_line))
        raise PairsError(f"{path}:{line}: not JSON ({reason}); right is {_FORMS}") from None


class _DuplicateKey(ValueError):
    """One key twice in a JSON object: which of the two was meant is unknown."""


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in items:
        if key in result:
            raise _DuplicateKey(f'the key "{key}" twice')
        result[key] = value
    return result


def parse_json(text: str) -> Any:
    """JSON, with every way in which it can be wrong as ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _error_of(line: str) -> ValueError:
    try:
        parse_json(line)
    except ValueError as error:
        return error
    return ValueError("more text after it")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error).splitlines()[0]


def _csv_rows(path: Path) -> Iterator[tuple[Any, str]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    start = 1
    try:
        header = next(reader, None)
        if not header:
            raise PairsError(f"{path}: the file is empty; right are the columns positive, negative")
        sides = _check_columns(header, f"{path}:1").sides
        for start, cells in _with_first_line(reader):
            if not cells:
                continue
            if len(cells) != len(header):
                raise PairsError(f"{path}:{start}: {len(cells)} cells under {len(header)} columns")
            where = f"{path}:{start}"
            yield _csv_row(dict(zip(header, cells, strict=True)), sides, where), where
    except csv.Error as error:
        raise PairsError(f"{path}:{reader.line_num}: not CSV ({error}); JSON lines carry any text") from None


def _with_first_line(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Records with the line they begin on: quoted cells may run over many."""
    start = reader.line_num + 1
    for cells in reader:
        yield start, cells
        start = reader.line_num + 1


def _check_columns(header: list[str], where: str) -> _Form:
    """The form that a table's columns have."""
    form = _form_with(header) or _TABLE[0]
    right = ", ".join(form.keys)
    if form.many:
        raise PairsError(f"{where}: lists of sides; CSV holds a pair a row: {', '.join(_TABLE[0].keys)}")
    for column in header:
        if column not in form.keys and not form.open:
            raise PairsError(f'{where}: unknown column "{column}"; right are {right}')
        if header.count(column) > 1:
            raise PairsError(f'{where}: the column "{column}" twice')
    for side in form.sides:
        if side not in header:
            raise PairsError(f'{where}: the column "{side}" is missing; right are {right}')
    return form


def _csv_row(row: dict[str, str], sides: tuple[str, str], where: str) -> dict[str, str]:
    for key, value in row.items():
        if value.lstrip().startswith('[{"role"'):
            raise PairsError(
                f'{where}: "{key}" holds chat messages; CSV holds texts, messages go into JSON lines'
            )
    # An empty cell is how CSV says that something optional is not there.
    return {key: value for key, value in row.items() if value or key in sides}


def read_text(path: Path) -> str:
    """A file as text. Raises PairsError where there is none, another thing is in its place, or it is not
    UTF-8.
    """
    try:
        content = path.read_bytes()
        if (instead := stand_in(content[:HEAD])) is not None:
            raise PairsError(f"{path}: {instead}")
        # utf-8-sig: spreadsheet programs put a byte order mark in front.
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise PairsError(f"{path}: {annex_link(path) or 'no such file'}") from None
    except UnicodeDecodeError as error:
        raise PairsError(f"{path}: not UTF-8 (byte {error.start}); right is a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise PairsError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


# --------------------------------------------------------------------------------------------------- checking


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _check_text(value: Any, where: str, instead: str) -> None:
    if not isinstance(value, str):
        raise PairsError(f"{where} is {_kind(value)}; right is a text")
    if not value.strip():
        raise PairsError(f"{where} is empty; {instead}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PairsError(f"{where} holds half a character (a lone surrogate) at {error.start}") from None


def check_content(content: Any, where: str, instead: str = "right is a text with words in it") -> None:
    """Raise PairsError where content is neither a text nor messages that a chat template can take; `instead`
    says what is right in place of nothing.
    """
    if isinstance(content, str):
        return _check_text(content, where, instead)
    if not isinstance(content, list):
        raise PairsError(f"{where} is {_kind(content)}; right is a text or a list of messages")
    if not content:
        raise PairsError(f"{where} has no messages; {instead}")
    for n, message in enumerate(content, 1):
        _check_message(message, f"{where}, message {n}")
    return None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise PairsError(f'{where} is {_kind(message)}; right is {{"role": …, "content": …}}')
    for key in ("role", "content"):
        if key not in message:
            raise PairsError(f'{where}: "{key}" is missing; right is {{"role": …, "content": …}}')
    for key in message:
        if key not in ("role", "content"):
            raise PairsError(f'{where}: unknown key "{key}"; right are role and content')
    if message["role"] not in ROLES:
        raise PairsError(f"{where}: the role {message['role']!r} is unknown; right are {', '.join(ROLES)}")
    _check_text(message["content"], f'{where}: "content"', "leave the message out instead")
