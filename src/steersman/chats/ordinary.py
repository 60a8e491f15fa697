"""What shows in ordinary chats: whether a template's arguments and its date reach the text of any of them."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steersman.chats.format import ChatFormat, chat_format, ordinary_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ABSENT = object()
_OTHERS = (_ABSENT, None, False, True, "b", 1)
"""What is tried in an argument's place; texts for what is only printed."""


def shows_date(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Whether another date makes any ordinary chat another text; None where the template takes none."""
    of = chat_format(tokenizer)
    # Another weekday, day, month and year.
    other = datetime.date(
        of.date.year + (1 if of.date.year < datetime.MAXYEAR else -1),
        of.date.month % 12 + 1,
        of.date.day % 28 + 1,
    )
    return _differ(tokenizer, of, replace(of, date=other))


def shows_argument(tokenizer: PreTrainedTokenizerBase, name: str) -> bool | None:
    """Whether an argument's being as it is shows in any ordinary chat; None where the template takes none."""
    of = chat_format(tokenizer)
    # transformers itself takes no other things for these.
    others = _OTHERS[:1] if name in ("tools", "documents") else _OTHERS
    found = [_differ(tokenizer, of, _with(of, name, other)) for other in others]
    return None if None in found else any(found)


def counts_as_true(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether all ordinary chats are the same with true in an argument's place."""
    of = chat_format(tokenizer)
    return _differ(tokenizer, of, _with(of, name, True)) is False


def _with(of: ChatFormat, name: str, value: Any) -> ChatFormat:
    rest = {key: kept for key, kept in of.arguments.items() if key != name}
    return replace(of, arguments=rest if value is _ABSENT else {**rest, name: value})


def _differ(tokenizer: PreTrainedTokenizerBase, one: ChatFormat, other: ChatFormat) -> bool | None:
    """Whether any chat that the one way renders is another text the other way, or refused; None where it
    renders none.
    """
    pairs = [
        (text, otherwise)
        for text, otherwise in zip(
            ordinary_texts(tokenizer, one), ordinary_texts(tokenizer, other), strict=True
        )
        if text is not None
    ]
    return any(text != otherwise for text, otherwise in pairs) if pairs else None
