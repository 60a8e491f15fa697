"""The proof that every message of a chat arrives in the text that its template makes of it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steersman.chats.format import Messages, apply, chat_format, first_line, name_of, named, template_of
from steersman.errors import ModelError, PairsError
from steersman.pairs import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_WORDS = ("role", "type", "id", "tool_call_id", "name")
"""Keys of a message that say what kind of thing it is, which a template may show in words of its own."""

_MARKS = (("mark-", "-of-steersman", "0123456789"), ("zq", "qz", "abcdefghij"))
"""Kinds of marks: head, tail, digits of the number between. Templates treat some words or lengths apart."""

_BARE_PART = re.compile(r"""["']type["']:\s*["']text["'],\s*["']text["']:\s*["']$""")
"""The end of a list of parts that a template shows as a whole, up to the text."""

Span = tuple[int, int]
Pieces = list[tuple[str, int | None]]
"""A rendered chat as the template's words, each with the number of the text after them; None at the end."""


@dataclass
class Shape:
    """What is known of chats of one shape: roles, fields, ending; all but what their texts say.

    Attributes:
        parts: The roles whose texts go to the template as lists of parts.
        made: What it makes of marks in place of all texts, by kind of mark; None where one is missing.
    """

    parts: Collection[str] = ()
    made: dict[int, Pieces | None] = field(default_factory=dict)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Messages as the chat template renders them, every one of them in it.

    Where the last is the user's (or a tool's), the generation prompt follows. Texts are given as lists of
    parts for the roles that the template shows only so. Raises ModelError where there is no chat template,
    PairsError where it refuses the messages, or does not show what one of them says.
    """
    if template_of(tokenizer) is None:
        raise ModelError(
            f"the tokenizer {name_of(tokenizer)} has no chat template, so messages cannot be rendered; "
            "give texts instead of messages, or a chat template "
            f"(--{chat_format(tokenizer).side}chat-template FILE)"
        )
    shape = shape_of(tokenizer, messages)
    try:
        text = _apply(tokenizer, messages, shape.parts)
    except Exception as error:
        # Templates are programs of the model's authors: what they raise says why they refuse the messages.
        raise PairsError(f"{named(tokenizer)} refuses the messages ({first_line(error)})") from error
    if _proven(tokenizer, shape, messages, text) is None:
        number = 0
        for place, message in enumerate(messages, 1):
            for said in _words(message):
                if not _alone(tokenizer, messages, number, said, text)[0]:
                    raise PairsError(_changed(tokenizer, place, message, said, text))
                number += 1
    chat_format(tokenizer).count += 1
    return text


def content_span(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, text: str
) -> Span | None:
    """Where the content of a message stands in the chat as `render_chat` made it; None where nothing says."""
    content = messages[index]["content"]
    before = dict(itertools.takewhile(lambda item: item[0] != "content", messages[index].items()))
    number = sum(len(_words(message)) for message in (*messages[:index], before))
    if not content.strip():  # what says nothing bears no mark
        messages = [*messages[:index], {**messages[index], "content": "a"}, *messages[index + 1 :]]
    elif spans := _proven(tokenizer, shape_of(tokenizer, messages), messages, text):
        return spans[number]
    return _alone(tokenizer, messages, number, content, text)[1]


def shows(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> bool:
    """Whether the template takes such messages and shows what every one of them says."""
    count = chat_format(tokenizer).count
    try:
        render_chat(tokenizer, messages)
    except PairsError:
        return False
    chat_format(tokenizer).count = count
    return True


def shape_of(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Shape:
    """What is known of chats of this shape.

    Found out once a shape: a mark for every text is put through the template. Raises PairsError where one is
    not in what comes out, whichever roles' texts are lists of parts.
    """
    forms = chat_format(tokenizer).forms
    shape = template_of(tokenizer) or "", json.dumps([_with(m, lambda _: "a") for m in messages])
    if shape not in forms:
        found, lost = _find_shape(tokenizer, messages)
        if lost:
            raise PairsError(_not_shown(tokenizer, messages, _place(messages, lost[0])))
        forms[shape] = found or Shape()  # or the template refuses such messages, which rendering them says
    known: Shape = forms[shape]
    return known


def _find_shape(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[Shape | None, list[int]]:
    """The shape in which all texts are shown; else none, and the numbers of those that are not."""
    roles = sorted({m["role"] for m in messages if isinstance(m.get("content"), str)})
    missing: list[list[int]] = []
    for kind in range(len(_MARKS)):
        for size in dict.fromkeys((0, len(roles), *range(1, len(roles)))):
            for parts in itertools.combinations(roles, size):
                pieces, lost = _marked(tokenizer, messages, parts, kind)
                if pieces and not lost:
                    return Shape(parts, {kind: pieces}), []
                if pieces:
                    missing.append(lost)
    return None, min(missing, key=len, default=[])


def _marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    parts: Collection[str],
    kind: int,
    only: int | None = None,
) -> tuple[Pieces, list[int]]:
    """A chat with marks for its texts (or the one) as it is rendered, and the numbers of those it lacks.

    Nothing where the template refuses it. Whatever case a mark is put in, it is known: whether words are
    left as they are is for each chat to find out.
    """
    head, tail, digits = _MARKS[kind]
    names: list[str] = []

    def mark(said: str) -> str:
        names.append("".join(digits[int(digit)] for digit in str(len(names))))
        return f"{head}{names[-1]}{tail}" if only in (None, len(names) - 1) else said

    try:
        text = _apply(tokenizer, [_with(message, mark) for message in messages], parts)
    except Exception:
        return [], []
    name = f"[{digits}]+" if only is None else names[only]
    *found, end = re.split(f"{head}({name}){tail}", text, flags=re.IGNORECASE)
    numbers = [names.index(name.lower()) for name in found[1::2]]
    shown = {n for words, n in zip(found[::2], numbers, strict=True) if not _BARE_PART.search(words)}
    wanted = range(len(names)) if only is None else [only]
    return [*zip(found[::2], numbers, strict=True), (end, None)], [n for n in wanted if n not in shown]


def _proven(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, messages: Messages, text: str
) -> dict[int, Span] | None:
    """Where every text of a chat stands, if it is rendered just as marks are; None where it is not."""
    said = [words for message in messages for words in _words(message)]
    for kind in range(len(_MARKS)):
        if kind not in shape.made:
            pieces, lost = _marked(tokenizer, messages, shape.parts, kind)
            shape.made[kind] = None if lost else pieces
        if (spans := _stand(shape.made[kind] or [], said, text)) is not None:
            return spans
    return None


def _alone(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, number: int, said: str, text: str
) -> tuple[bool, Span | None]:
    """Whether one text is in the rendered chat, and where, as the same chat with a mark for it says.

    For templates whose own words depend on what is said. Where they do, it is there if it occurs more often
    than in all that stands around the mark.
    """
    parts = shape_of(tokenizer, messages).parts
    made = [_marked(tokenizer, messages, parts, kind, number) for kind in range(len(_MARKS))]
    shown = [pieces for pieces, lost in made if pieces and not lost]
    words = [""] * number + [said]
    for pieces in shown:
        if spans := _stand(pieces, words, text):
            return True, spans[number]
    around = ["\0".join(own for own, _ in pieces) for pieces in shown]
    for form in (_loose(said), *map(re.escape, _as_json(said.strip()))):
        often = len(re.findall(form, text))
        if around and all(often > len(re.findall(form, other)) for other in around):
            beside = {span for pieces in shown for span in _beside(pieces, said, text)}
            if not beside and often == 1:
                beside = {found.span() for found in re.finditer(form, text)}
            return True, beside.pop() if len(beside) == 1 else None
    return False, None


def _stand(pieces: Pieces, said: list[str], text: str) -> dict[int, Span] | None:
    """Where each text first stands, if the pieces with the texts in place of their marks are the whole."""
    ways: dict[int, dict[int, Span]] = {0: {}} if pieces else {}
    for own, number in pieces:
        reached: dict[int, dict[int, Span]] = {}
        for at, spans in ways.items():
            start = at + len(own)
            if not text.startswith(own, at):
                continue
            if number is None:
                reached[start] = spans
                continue
            for end in _ends(said[number], text, start):
                reached.setdefault(end, {number: (start, end)} | spans)
        ways = reached
    return ways.get(len(text))


def _ends(said: str, text: str, start: int) -> Iterator[int]:
    """Where a text that starts here may end: as it is, trimmed, as JSON writes it, or in other whitespace."""
    forms = [form for form in _plain(said) if text.startswith(form, start)]
    if not forms or said.rstrip().endswith("\\"):  # of which JSON makes two, that begin with the one
        forms = [form for form in _forms(said) if text.startswith(form, start)]
    yield from (start + len(form) for form in forms)
    if not forms and (found := re.compile(_loose(said)).match(text, start)):
        yield found.end()


def _beside(pieces: Pieces, said: str, text: str) -> Iterator[Span]:
    """Where a text stands, by what comes before its first mark alone, and by what follows the last alone."""
    before, after = pieces[0][0], pieces[-1][0]
    if text.startswith(before):
        yield from ((len(before), end) for end in itertools.islice(_ends(said, text, len(before)), 1))
    end = len(text) - len(after)
    if text.endswith(after) and len(pieces) == 2:
        forms = (form for form in _forms(said) if text.endswith(form, 0, end))
        yield from ((end - len(form), end) for form in itertools.islice(forms, 1))


def _plain(said: str) -> Collection[str]:
    return dict.fromkeys((said, said.rstrip(), said.lstrip(), said.strip()))


def _forms(said: str) -> Collection[str]:
    return dict.fromkeys((*_plain(said), *_as_json(said), *_as_json(said.strip())))


def _as_json(said: str) -> list[str]:
    return [json.dumps(said, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)]


def _loose(said: str) -> str:
    """A pattern of a text in any whitespace; only beside a tag may there be none, or some where none was."""
    tagged = re.sub(r"\s*(</?\w+>)\s*", "\0\\1\0", said.strip()).strip("\0")
    words = re.split(r"(\0+|\s+)", tagged)
    return "".join(
        re.escape(word) if place % 2 == 0 else r"\s*" if "\0" in word else r"\s+"
        for place, word in enumerate(words)
    )


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, parts: Collection[str]) -> str:
    return apply(tokenizer, _in_parts(messages, parts), messages[-1]["role"] in ("user", "tool"))


def _place(messages: Messages, number: int) -> int:
    """The place of the message that a text is in."""
    ends = itertools.accumulate(len(_words(message)) for message in messages)
    return next(place for place, end in enumerate(ends) if number < end)


def _with(value: Any, say: Callable[[str], str], key: str | None = None) -> Any:
    """A message, or a part of one, with other words for all that it says."""
    if isinstance(value, str):
        return value if key in _NO_WORDS or not value.strip() else say(value)
    if isinstance(value, Mapping):
        return {name: _with(part, say, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with(part, say, key) for part in value]
    return value


def _words(message: Mapping[str, Any]) -> list[str]:
    """All texts in a message."""
    found: list[str] = []
    _with(message, lambda said: found.append(said) or said)  # type: ignore[func-returns-value]
    return found


def _in_parts(messages: Messages, roles: Collection[str]) -> Messages:
    """Messages with the texts of these roles as lists of parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if message["role"] in roles and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _not_shown(tokenizer: PreTrainedTokenizerBase, messages: Messages, place: int) -> str:
    """A message that the template drops, and what would be right: another role, another ending."""
    role, last = messages[place]["role"], messages[-1]["role"]
    right: list[str] = []
    for other in ROLES[:3]:
        tried = [*messages[:place], {**messages[place], "role": other}, *messages[place + 1 :]]
        if other != role and _find_shape(tokenizer, tried)[0]:
            right.append(f"the role {other} for it")
    if last != "user" and _find_shape(tokenizer, [*messages, {"role": "user", "content": "a"}])[0]:
        right.append("a chat that ends with the user")
    chat = ", ".join(message["role"] for message in messages)
    return (
        f"message {place + 1} ({_quoted(messages[place])}), of the role {role}, does not reach the model: "
        f"{named(tokenizer)} leaves it out of a chat of {chat}; "
        f"right is {' or '.join([*right, 'a template that shows it'])}"
    )


def _changed(
    tokenizer: PreTrainedTokenizerBase, number: int, message: Mapping[str, Any], said: str, text: str
) -> str:
    """A message that does not stand in the text as it was written, by the first word that is missing."""
    lost = next((word for word in said.split() if word not in text), None)
    why = f"{_brief(lost)} is not in the text" if lost else "nothing shows that the text has it in its place"
    return (
        f"message {number} ({_quoted(message)}), of the role {message['role']}, does not reach the model as "
        f"it is written: {named(tokenizer)} changes it ({why}); "
        "right are words that it leaves as they are, or a template that shows them"
    )


def _quoted(message: Mapping[str, Any]) -> str:
    return _brief(next(iter(_words(message)), ""))


def _brief(text: str, width: int = 40) -> str:
    return json.dumps(text if len(text) <= width else f"{text[:width]}…", ensure_ascii=False)
