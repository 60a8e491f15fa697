"""Text of files and models made harmless for a page: nothing in it can act, hide or turn the line around."""

from __future__ import annotations

import re
from typing import Any

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
"""Control characters, those that turn the direction of whatever follows, halves of characters, and what no
document may hold."""

_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&$])")
_LINKS = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(:)|\b(www)(\.)")


def harmless(value: Any) -> Any:
    """JSON data in which every text, keys too, has such characters replaced by U+FFFD."""
    if isinstance(value, str):
        return _CONTROLS.sub("\ufffd", value)
    if isinstance(value, list):
        return [harmless(entry) for entry in value]
    if isinstance(value, dict):
        return {harmless(key): harmless(entry) for key, entry in value.items()}
    return value


def markdown(text: object) -> str:
    """Text on one line of Markdown, read as it is: no markup, table border, link or HTML in it counts."""
    line = " ".join(str(text).split())
    escaped = _MARKUP.sub(r"\\\1", line)
    return _LINKS.sub(lambda found: (found[1] or found[3]) + "\\" + (found[2] or found[4]), escaped)


def messages(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as (role, text): of plain text the role is empty."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(str(message["role"]), _content(message["content"])) for message in prompt]


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content)
