"""How the chats of a run were rendered, as artifacts keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


def difference(one: ChatRecord | None, other: ChatRecord | None) -> tuple[str, str] | None:
    """What tells two ways of rendering apart, in words for either; None where nothing does, or where no chat
    was rendered in one of them.
    """
    if one is None or other is None or one == other:
        return None
    if one.template_sha256 != other.template_sha256:
        return f"the chat template {one.template_sha256[:8]}…", f"{other.template_sha256[:8]}…"
    if one.arguments != other.arguments:
        said = [json.dumps(dict(of.arguments), ensure_ascii=False, sort_keys=True) for of in (one, other)]
        return f"the template's arguments {said[0]}", said[1]
    if one.date is None or other.date is None:  # one of them had no chat that shows it
        return None
    return f"the date {one.date}", other.date


def common(*records: ChatRecord | None) -> ChatRecord | None:
    """The record of runs that `difference` does not tell apart, taken together."""
    known = [record for record in records if record is not None]
    return max(known, key=lambda record: record.date or "", default=None)


def rendered_by(record: Mapping[str, Any] | None) -> ChatRecord | None:
    """What `ChatRecord.to_json` gave, read again; not checked."""
    return None if record is None else ChatRecord(**record)
