"""Saying how chats are rendered: by which template, with which arguments, on which day."""

from __future__ import annotations

import datetime
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes

from steersman.chat_record import unkept
from steersman.chats.arrival import shape_of
from steersman.chats.format import (
    FORMAT,
    ChatFormat,
    chat_format,
    compiled,
    first_line,
    name_of,
    named,
    template_of,
)
from steersman.chats.ordinary import counts_as_true, shows_argument, shows_date
from steersman.errors import ModelError, PairsError, told, valid_name
from steersman.pairs import parse_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = ("messages", "add_generation_prompt", "continue_final_message", "strftime_now", "raise_exception")
"""What a template is given in any case: no argument of a user's."""

_SAID_NO = {
    **dict.fromkeys(("false", "no", "off"), "false (in Python False)"),
    **dict.fromkeys(("none", "null"), "null (in Python None)"),
}
"""Texts that mean false or nothing, and what is right for them."""


def set_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: str | datetime.date | None = None,
) -> None:
    """Say how a tokenizer's chats are rendered from now on.

    Args:
        tokenizer: Of the model that reads the chats.
        template: A file with a chat template (or a JSON file with one under `chat_template`), or the
            template's text; default: the tokenizer's own.
        arguments: What the template is given beside the messages, such as `{"enable_thinking": False}`.
        date: What the template takes for today, also as YYYY-MM-DD; default: today.

    Raises:
        ModelError: there is no such file, it is no template that shows the user's words, the template uses
            no such argument, or no ordinary chat shows it, or asks for no date.

    Example:
        >>> model, tokenizer = steersman.load_model("lab:moe")
        >>> template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        >>> steersman.set_chat_format(tokenizer, template=template)
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        'user: hello '
    """
    given = _kept(arguments or {})
    source = None
    if template is not None:
        source, tokenizer.chat_template = _read_template(template)
    if not given and date is None and template is None:
        return
    setattr(tokenizer, FORMAT, ChatFormat(given, _day(date), source, dated=date is not None))
    own = template_of(tokenizer)
    if own is None:
        what = "chat template arguments" if given else "a chat date"
        raise ModelError(f"{name_of(tokenizer)}: {what} without a chat template; give one too")
    tree = _parsed(own, named(tokenizer))
    _check_arguments(tokenizer, tree)
    asks = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
    if date is not None and not (asks and shows_date(tokenizer) is not False):
        raise ModelError(
            f"{named(tokenizer)} asks for no date, so that a chat date would not reach the model"
        )
    if template is not None:
        _check_user(tokenizer)


def _check_arguments(tokenizer: PreTrainedTokenizerBase, tree: nodes.Template) -> None:
    """Raise ModelError for an argument that decides nothing, or something else than it says."""
    transformers_own = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    used = meta.find_undeclared_variables(tree) - {*_OURS, *transformers_own, *tokenizer.special_tokens_map}
    for name, value in chat_format(tokenizer).arguments.items():
        if name not in used:
            known = ", ".join(sorted(used - {"tools", "documents"})) or "none"
            raise ModelError(f'{named(tokenizer)} never uses the argument "{name}"; those it uses: {known}')
        right = _SAID_NO.get(value.strip().lower()) if isinstance(value, str) else None
        if right and counts_as_true(tokenizer, name):
            raise ModelError(
                f'{named(tokenizer)} takes the text {json.dumps(value)} of the argument "{name}" for true; '
                f"right is {right}"
            )
        if shows_argument(tokenizer, name) is False:
            raise ModelError(
                f'the argument "{name}" ({json.dumps(value)}) would not reach the model: ordinary chats are '
                f"the same text without it, or with another value, in {named(tokenizer)}"
            )


def _kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as artifacts keep them, and as templates are given them."""
    if not isinstance(arguments, Mapping):
        raise ModelError(f"chat template arguments are {told(arguments)}: give {{name: value}}")
    for name, value in arguments.items():
        if not isinstance(name, str) or (reason := unkept(value)):
            reason = reason if isinstance(name, str) else "its name is no text"
            raise ModelError(
                f"the chat template argument {name!r}: {reason}; right is a value that JSON can write"
            )
    kept: dict[str, Any] = json.loads(json.dumps(dict(arguments)))
    return kept


def _read_template(template: str | Path) -> tuple[str, str]:
    """The name of a template's source, and its text."""
    if isinstance(template, str) and any(sign in template for sign in "{\n"):
        return "given", template
    path = Path(valid_name(template, ModelError))
    try:
        text = read_text(path)
        if path.suffix == ".json":
            content = parse_json(text)
            if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
                raise ModelError(f'{path}: no text under "chat_template" in it')
            text = content["chat_template"]
    except (PairsError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error) if isinstance(error, PairsError) else f"{path}: not JSON ({first_line(error)})"
        raise ModelError(reason) from None
    if not text.strip():
        raise ModelError(f"{path}: the file is empty; right is a chat template in Jinja")
    return str(path), text


def _day(date: str | datetime.date | None) -> datetime.date:
    if date is None:
        return datetime.date.today()
    if isinstance(date, datetime.datetime):
        return date.date()
    if isinstance(date, datetime.date):
        return date
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d").date()
    except (ValueError, TypeError):
        raise ModelError(f"the chat date {date!r} is none; right is YYYY-MM-DD") from None


def _parsed(template: str, name: str) -> nodes.Template:
    try:
        return compiled(template).environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{name}, line {error.lineno}: not a chat template ({error.message})") from None


def _check_user(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a template that shows no user's words: it is none."""
    try:
        shape_of(tokenizer, [{"role": "user", "content": "a"}])
    except PairsError as error:
        raise ModelError(str(error)) from None
