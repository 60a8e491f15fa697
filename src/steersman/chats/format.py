"""How a tokenizer renders chats: its template, with the arguments and the date that were asked for."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2

from steersman.chat_record import ChatRecord
from steersman.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

FORMAT = "steersman_chat_format"
"""Attribute of a tokenizer: its `ChatFormat`."""


_SAID = {"role": "assistant", "content": "a"}
_THOUGHT = {"role": "assistant", "content": "<think>\nb\n</think>\n\na", "reasoning_content": "b"}
_CALL = {"type": "function", "id": "aaaaaaaaa", "function": {"name": "f", "arguments": {"x": "a"}}}
_ASKED = {"role": "user", "content": "a"}
_ORDINARY: list[list[dict[str, Any]]] = [
    [_ASKED],
    [{"role": "system", "content": "a"}, _ASKED],
    [_ASKED, _SAID],
    [{"role": "developer", "content": "a"}, _ASKED],
    [_ASKED, _SAID, _ASKED],
    [_ASKED, _THOUGHT, _ASKED],
    [_ASKED, _THOUGHT],
    [_ASKED, {**_SAID, "tool_calls": [_CALL]}, {"role": "tool", "content": "a", "tool_call_id": "aaaaaaaaa"}],
]
_IN_PARTS = [
    [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    for chat in _ORDINARY
]
"""Chats as people write them, which a template need not all take: with texts, and with lists of parts."""


@dataclass
class ChatFormat:
    """How a tokenizer's chats are rendered, and what is known of it by now.

    Attributes:
        arguments: What the template is given beside the messages.
        date: What it takes for today.
        source: The file that the template was read from; None for the tokenizer's own.
        side: Which of a map's models it is, as the command line's options begin: `source-`, `target-`.
        count: Chats that were rendered so far.
        asked: How often the template has asked for the date.
        dated: Whether the date was given.
        forms: {(template, shape of a chat): what is known of it (`steersman.chats.arrival.Shape`)}.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = field(default_factory=datetime.date.today)
    source: str | None = None
    side: str = ""
    count: int = 0
    asked: int = 0
    dated: bool = False
    forms: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """How a tokenizer's chats are rendered: by its own template, without arguments, today, if nobody said."""
    found = getattr(tokenizer, FORMAT, None)
    if not isinstance(found, ChatFormat):
        found = ChatFormat()
        setattr(tokenizer, FORMAT, found)
    return found


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that messages go through, with the tools among its arguments, if there are any; None
    where there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        tools = chat_format(tokenizer).arguments.get("tools")
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # several, and none of them the default
        raise ModelError(f"the tokenizer {name_of(tokenizer)}: {first_line(error)}") from None


class NotedChats:
    """Whether chats are rendered by a tokenizer from now on, and how."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        of = chat_format(tokenizer)
        self._tokenizer, self._before, self._asked = tokenizer, of.count, of.asked

    @property
    def so_far(self) -> ChatRecord | None:
        """How they were, with the date if one of them asked for it; None where none was rendered."""
        of = chat_format(self._tokenizer)
        return None if of.count <= self._before else _record(self._tokenizer, of.asked > self._asked)

    @property
    def record(self) -> ChatRecord | None:
        """The same of all chats of a run. Raises ModelError where a date was given and none asked."""
        found, of = self.so_far, chat_format(self._tokenizer)
        if found is not None and found.date is None and of.dated:
            raise ModelError(
                f"{named(self._tokenizer)} asks for no date in these chats, so that the chat date "
                f"{of.date.isoformat()} would not reach the model; right is none"
            )
        return found


def _record(tokenizer: PreTrainedTokenizerBase, dated: bool) -> ChatRecord:
    of = chat_format(tokenizer)
    digest = hashlib.sha256((template_of(tokenizer) or "").encode()).hexdigest()
    return ChatRecord(digest, of.arguments, of.date.isoformat() if dated else None)


def ordinary_texts(tokenizer: PreTrainedTokenizerBase, of: ChatFormat) -> Iterator[str | None]:
    """The ordinary chats as they are rendered in a format's way; None for those that are refused."""
    for chat in (*_ORDINARY, *_IN_PARTS):
        before = chat_format(tokenizer)
        setattr(tokenizer, FORMAT, of)
        try:
            text: str | None = apply(tokenizer, chat, chat[-1]["role"] != "assistant")
        except Exception:  # a template need not take every role
            text = None
        finally:
            setattr(tokenizer, FORMAT, before)
        yield text


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's chat template, for messages."""
    source = chat_format(tokenizer).source
    return f"the chat template {source}" if source else f"the chat template of {name_of(tokenizer)}"


def apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, answering: bool) -> str:
    """What the template makes of messages; raises whatever the template raises."""
    with _dated(tokenizer):
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=answering,
            **chat_format(tokenizer).arguments,
        )
    return str(rendered)


_rendering: ContextVar[ChatFormat | None] = ContextVar("rendering", default=None)


@contextmanager
def _dated(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let a template's `strftime_now` tell the format's date, for whoever renders inside; nobody else."""
    # transformers compiles a template once, and gives it no other clock than the machine's.
    template = compiled(template_of(tokenizer) or "")
    machines = template.globals["strftime_now"]
    if not getattr(machines, "tells_the_chat_date", False):
        template.globals["strftime_now"] = _clock(machines)
    token = _rendering.set(chat_format(tokenizer))
    try:
        yield
    finally:
        _rendering.reset(token)


def _clock(machines: Callable[[str], str]) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        of = _rendering.get()
        if of is None:
            return machines(format)
        of.asked += 1
        return datetime.datetime.combine(of.date, datetime.time()).strftime(format)

    strftime_now.tells_the_chat_date = True  # type: ignore[attr-defined]
    return strftime_now


def compiled(template: str) -> jinja2.Template:
    """The very object that transformers renders with."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    found: jinja2.Template = _compile_jinja_template(template)
    return found


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer is called in messages."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
