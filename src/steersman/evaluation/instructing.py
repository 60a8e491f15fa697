"""Prompts as an arm puts them: after an instruction, inside a template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steersman.chats.arrival import shows
from steersman.errors import PairsError
from steersman.pairs import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"
"""Where a template takes the user's words."""


def check_template(template: str, where: str) -> str:
    """The template itself. Raises PairsError where it has no place for the prompt, or more than one."""
    if template.count(PLACE) != 1:
        raise PairsError(f"{where}: a template holds {PLACE} once, where the user's words go")
    return template


def instructed(
    content: Content, system: str | None, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> Content:
    """A prompt with the user's last words inside a template, after an instruction.

    The instruction is a system message; where the chat template takes none, it stands at the head of the
    user's first message; before a plain text it is a paragraph of its own.
    """
    if template is not None:
        content = _inside(content, template)
    if system is None:
        return content
    if isinstance(content, str):
        return f"{system}\n\n{content}"
    messages = list(content)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n{system}"}, *messages[1:]]
    with_system = [{"role": "system", "content": system}, *messages]
    if shows(tokenizer, with_system):
        return with_system
    return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]


def _inside(content: Content, template: str) -> Content:
    if isinstance(content, str):
        return template.replace(PLACE, content)
    messages = list(content)
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise PairsError("a template goes around the user's words, and this prompt has no user's message")
    messages[last] = {**messages[last], "content": template.replace(PLACE, messages[last]["content"])}
    return messages
