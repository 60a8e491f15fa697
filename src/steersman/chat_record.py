"""How the chats of a run were rendered, as artifacts keep it."""

from __future__ import annotations

import json
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
    "arguments": ("the chat template's arguments ({values})", "--{side}chat-template-arg"),
    "date": ("the date that chats were rendered with ({values})", "--{side}chat-date {there}"),
}


def _otherwise(there: Mapping[str, Any], here: Mapping[str, Any], side: str, form: str) -> Otherwise:
    for key, (words, option) in _WORDS.items():
        old, new = there.get(key), here.get(key)
        # Without a date no chat showed one, which says nothing against another's.
        if old != new and not (key == "date" and None in (old, new)):
            said = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
            values = form.format(*(text[:16] + "…" if len(text) == 64 else text for text in said))
            return words.format(values=values), option.format(side=side, there=old)
    return None


def common(one: ChatRecord | None, other: ChatRecord | None) -> ChatRecord | None:
    """The record of two runs whose chats were rendered alike, taken together."""
    known = [record for record in (one, other) if record is not None]
    return max(known, key=lambda record: record.date or "", default=None)


def in_provenance(record: ChatRecord | None) -> dict[str, Any]:
    """What a plan's provenance says of the chats behind it; nothing where there were none."""
    return {} if record is None else {"chat": record.to_json()}


def to_json(record: ChatRecord | None) -> dict[str, Any] | None:
    """What manifests hold of chats, null where there were none."""
    return None if record is None else record.to_json()
