"""How the chats of a run were rendered, as artifacts keep it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHATS = "chats"
"""What a run calls how its chats were rendered, among its settings."""


@dataclass(frozen=True)
class ChatRecord:
    """How the chats of a run were rendered, as artifacts keep it.

    Attributes:
        template_sha256: Hex sha256 of the chat template's text.
        arguments: What the template was given beside the messages, by name.
        date: The day that the template took for today, YYYY-MM-DD; None where it asks for none.
    """

    template_sha256: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What manifests hold."""
        return {
            "template_sha256": self.template_sha256,
            "arguments": dict(self.arguments),
            "date": self.date,
        }

    def __str__(self) -> str:
        given = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in self.arguments.items()]
        day = [] if self.date is None else [f"the date {self.date}"]
        return ", ".join([f"the chat template {self.template_sha256[:8]}…", *given, *day])


def unkept(value: Any) -> str | None:
    """Why a value is nothing that artifacts can keep, which is JSON in UTF-8; None where it is."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    except (TypeError, ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return None


Otherwise = tuple[str, str] | None
"""In what two ways of rendering differ, with both values, and the option that makes them alike."""


def rendered_otherwise(there: Any, here: Any, form: str = "{} there, {} here") -> Otherwise:
    """In what two runs' chats were rendered otherwise; None where they were not, or none was in one of them.

    Args:
        there: What `ChatRecord.to_json` gave in the run before; of several models {side: that of each}.
        here: The same of the run that is to go on, or be added.
        form: How the two values of one are said.
    """
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return None
    if "template_sha256" in there and "template_sha256" in here:
        return _otherwise(there, here, "", form)
    told = (
        _otherwise(there[side], here[side], f"{side}-", form)
        for side in here
        if isinstance(there.get(side), Mapping) and isinstance(here[side], Mapping)
    )
    return next((one for one in told if one), None)


_WORDS = {
    "template_sha256": ("the chat template (sha256 {values})", "--{side}chat-template FILE"),
    "arguments": ("the chat template's arguments ({values})", "{given}"),
    "date": ("the date that chats were rendered with ({values})", "--{side}chat-date {there}"),
}


def _otherwise(there: Mapping[str, Any], here: Mapping[str, Any], side: str, form: str) -> Otherwise:
    for key, (words, option) in _WORDS.items():
        old, new = there.get(key), here.get(key)
        # Without a date no chat showed one, which says nothing against another's.
        # As text, since to Python 1 is true, and templates write what they are given.
        texts = [json.dumps(value, sort_keys=True) for value in (old, new)]
        if texts[0] != texts[1] and not (key == "date" and None in (old, new)):
            said = [
                value if isinstance(value, str) else text
                for value, text in zip((old, new), texts, strict=True)
            ]
            values = form.format(*(text[:16] + "…" if len(text) == 64 else text for text in said))
            given = _typed(old, f"--{side}chat-template-arg")
            return words.format(values=values), option.format(side=side, there=old, given=given)
    return None


def _typed(arguments: Any, option: str) -> str:
    """How arguments of a template are given on the command line."""
    given = arguments.items() if isinstance(arguments, Mapping) else ()
    typed = (f"{option} {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in given)
    return " ".join(typed) or f"no {option}"


def common(one: ChatRecord | None, other: ChatRecord | None) -> ChatRecord | None:
    """The record of two runs whose chats were rendered alike, taken together."""
    known = [record for record in (one, other) if record is not None]
    return max(known, key=lambda record: record.date or "", default=None)


def in_provenance(record: ChatRecord | None) -> dict[str, Any]:
    """What a plan's provenance says of the chats behind it; nothing where there were none."""
    return {} if record is None else {"chat": record.to_json()}


def chats_behind(made: Any) -> list[ChatRecord]:
    """How the chats behind a plan's provenance were rendered, each way once; of what was transplanted
    those of its own model.
    """
    found, within = [], made if isinstance(made, list | tuple) else []
    if isinstance(made, Mapping):
        found = [record] if (record := _told(made.get("chat"))) else []
        within = [
            of for key, of in made.items() if key != "chat" and not (key == "concept" and "map" in made)
        ]
    for of in within:
        found += [record for record in chats_behind(of) if record not in found]
    return found


def _told(chat: Any) -> ChatRecord | None:
    """A record as provenance holds it; None for what is none, since other tools may say what they like."""
    if not isinstance(chat, Mapping) or not isinstance(chat.get("template_sha256"), str):
        return None
    arguments, date = chat.get("arguments"), chat.get("date")
    return ChatRecord(
        chat["template_sha256"],
        arguments if isinstance(arguments, Mapping) else {},
        date if isinstance(date, str) else None,
    )


def to_json(record: ChatRecord | None) -> dict[str, Any] | None:
    """What manifests hold of chats, null where there were none."""
    return None if record is None else record.to_json()
