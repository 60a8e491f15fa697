"""The proof that every message of a chat arrives in the text that its template makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from steersman.chats.format import Messages, apply, chat_format, first_line, name_of, named, template_of
from steersman.errors import ModelError, PairsError
from steersman.pairs import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_WORDS = ("role", "type", "id", "tool_call_id", "name")
"""Keys of a message that say what kind of thing it is, which a template may show in words of its own."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Messages as the chat template renders them, every one of them in it.

    Where the last is the user's (or a tool's), the generation prompt follows. Texts are given as lists of
    parts to a template that shows them only so. Raises ModelError where there is no chat template,
    PairsError where it refuses the messages, or does not show what one of them says.
    """
    if template_of(tokenizer) is None:
        raise ModelError(
            f"the tokenizer {name_of(tokenizer)} has no chat template, so messages cannot be rendered; "
            "give texts instead of messages, or a chat template (--chat-template FILE)"
        )
    answering = messages[-1]["role"] in ("user", "tool")
    parts = wants_parts(tokenizer, messages, answering)
    try:
        text = apply(tokenizer, _in_parts(messages) if parts else messages, answering)
    except Exception as error:
        # Templates are programs of the model's authors: what they raise says why they refuse the messages.
        raise PairsError(f"{named(tokenizer)} refuses the messages ({first_line(error)})") from error
    for number, message in enumerate(messages, 1):
        for said in _words(message):
            if not _is_in(said, text):
                raise PairsError(_changed(tokenizer, number, message, said, text))
    chat_format(tokenizer).count += 1
    return text


def shows(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> bool:
    """Whether the template takes such messages and shows what every one of them says."""
    count = chat_format(tokenizer).count
    try:
        render_chat(tokenizer, messages)
    except PairsError:
        return False
    chat_format(tokenizer).count = count
    return True


def wants_parts(tokenizer: PreTrainedTokenizerBase, messages: Messages, answering: bool) -> bool:
    """Whether chats of this shape go to the template with their texts as lists of parts.

    Found out once a shape: a mark for every text is put through the template. Raises PairsError where one is
    not in what comes out, either way.
    """
    forms = chat_format(tokenizer).forms
    shape = template_of(tokenizer) or "", json.dumps([[_with(m, lambda _: "") for m in messages], answering])
    if shape not in forms:
        plain = _lost(tokenizer, messages, answering)
        if plain != [] and _lost(tokenizer, _in_parts(messages), answering) == []:
            forms[shape] = True
        elif plain:
            raise PairsError(_not_shown(tokenizer, messages, plain[0]))
        else:  # it is all there, or the template refuses such messages, which rendering them says
            forms[shape] = False
    return forms[shape]


def _lost(tokenizer: PreTrainedTokenizerBase, messages: Messages, answering: bool) -> list[int] | None:
    """Places of messages whose marks are not in what the template renders; None where it refuses them."""
    marks: list[str] = []
    counts: list[int] = []

    def mark(_: str) -> str:
        marks.append(f"mark-{len(marks)}-of-steersman")
        return marks[-1]

    marked = []
    for message in messages:
        marked.append(_with(message, mark))
        counts.append(len(marks))
    try:
        text = apply(tokenizer, marked, answering).lower()  # other cases are for each chat to find out
    except Exception:
        return None
    starts = [0, *counts]
    return [
        place
        for place, (start, end) in enumerate(zip(starts, counts, strict=False))
        if not all(mark in text for mark in marks[start:end])
    ]


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


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def _is_in(said: str, text: str) -> bool:
    """Whether the words are there: as they are, trimmed, as JSON writes them, or in other whitespace."""
    trimmed = said.strip()
    forms = (json.dumps(trimmed, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))
    return trimmed in text or any(f in text for f in forms) or "".join(said.split()) in "".join(text.split())


def _not_shown(tokenizer: PreTrainedTokenizerBase, messages: Messages, place: int) -> str:
    """A message that the template drops, and what would be right: another role, another ending."""
    role, last = messages[place]["role"], messages[-1]["role"]
    right: list[str] = []
    for other in ROLES[:3]:
        tried = [*messages[:place], {**messages[place], "role": other}, *messages[place + 1 :]]
        if other != role and _lost(tokenizer, tried, tried[-1]["role"] in ("user", "tool")) == []:
            right.append(f"the role {other} for it")
    if last != "user" and _lost(tokenizer, [*messages, {"role": "user", "content": "a"}], True) == []:
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
    lost = next((word for word in said.split() if word not in text), said)
    return (
        f"message {number} ({_quoted(message)}), of the role {message['role']}, does not reach the model as "
        f"it is written: {named(tokenizer)} changes it ({_brief(lost)} is not in the text); "
        "right are words that it leaves as they are, or a template that shows them"
    )


def _quoted(message: Mapping[str, Any]) -> str:
    return _brief(next(iter(_words(message)), ""))


def _brief(text: str, width: int = 40) -> str:
    return json.dumps(text if len(text) <= width else f"{text[:width]}…", ensure_ascii=False)
