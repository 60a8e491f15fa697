"""Texts and chats as a model reads them: rendered, as token ids, and where the tokens of a target stand."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steersman.chats.arrival import content_span, render_chat
from steersman.chats.format import name_of
from steersman.errors import ModelError, PairsError
from steersman.pairs import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["target", "prompt", "answer"]
"""Which tokens of a text are meant: those of its target, those before the final answer, or the answer's."""


class TruncatedTarget(PairsError):
    """A side of a pair that is longer than the model can read."""


@dataclass(frozen=True)
class EncodedText:
    """A text as token ids, and the ascending positions of the target's tokens in it (never empty)."""

    ids: tuple[int, ...]
    target: tuple[int, ...]
    text: str


def render(tokenizer: PreTrainedTokenizerBase, content: Content) -> tuple[str, bool]:
    """The text as it is tokenized, and whether the tokenizer's special tokens are still to be added to it.

    Messages go through the chat template, which writes its own special tokens; where the last is the user's
    (or a tool's), the generation prompt follows. A text stays as it is. Raises ModelError where there is no
    chat template, PairsError where the template refuses the messages, or does not show what they say.
    """
    if isinstance(content, str):
        return content, True
    return render_chat(tokenizer, content), False


def encode(
    tokenizer: PreTrainedTokenizerBase,
    content: Content,
    target: str | None,
    *,
    where: str,
    max_length: int | None = None,
    part: Part = "target",
    special: Collection[int] | None = None,
) -> EncodedText:
    """Token ids of a text or chat, and the positions of its target's tokens.

    The target is the last occurrence of ``target`` in the rendered text; without one the content of the last
    assistant message, else of the last user message, else the whole text. A token belongs to it if its
    character span overlaps the target's; special tokens (the unknown token too) and zero-width tokens never.

    With ``part="answer"`` the content of the chat's final message takes the target's place, which must be the
    assistant's; with ``"prompt"`` all that comes before it (of a text, or a chat without an answer,
    everything). Targets are not looked at then. ``special`` are the ids of `special_ids`, where they are
    known.

    ``where`` names pair and side in messages. Raises PairsError where the target is not in the text or covers
    no token, TruncatedTarget where there are more than ``max_length`` tokens, ModelError where the tokenizer
    gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {name_of(tokenizer)} gives no character offsets, which targets need; "
            "load a fast tokenizer (one with a tokenizer.json)"
        )
    text, add_special = _rendered(tokenizer, content, where)
    if part == "target":
        start, end = _target_span(tokenizer, content, target, text, where)
    else:
        start, end = _part_span(tokenizer, content, part, text, where)
    encoding = tokenizer(
        text,
        add_special_tokens=add_special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids = tuple(encoding["input_ids"])
    if max_length is not None and len(ids) > max_length:
        raise TruncatedTarget(f"{where}: {len(ids)} tokens, but the model reads at most {max_length}")
    special = special_ids(tokenizer) if special is None else special
    positions = tuple(
        position
        for position, (id_, (first, last)) in enumerate(zip(ids, encoding["offset_mapping"], strict=True))
        if first < end and start < last and first < last and id_ not in special
    )
    if not positions:
        raise PairsError(
            f"{where}: no token covers the {part} {_quote(text[start:end])}; special tokens do not count"
        )
    return EncodedText(ids=ids, target=positions, text=text)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, content: Content, *, where: str, max_length: int | None = None
) -> tuple[int, ...]:
    """Token ids of what a model is to continue: a chat without its final assistant message, with the
    generation prompt; a text as it is.

    Raises PairsError where nothing is left to continue, TruncatedTarget where there are more than
    ``max_length`` tokens.
    """
    content = prompt_of(content)
    if not content:
        raise PairsError(f"{where}: only an answer, no prompt to continue")
    text, add_special = _rendered(tokenizer, content, where)
    ids = tuple(tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])
    if not ids:
        raise PairsError(f"{where}: the prompt has no tokens")
    if max_length is not None and len(ids) > max_length:
        raise TruncatedTarget(
            f"{where}: {len(ids)} tokens, but the model reads at most {max_length} beside the new ones"
        )
    return ids


def prompt_of(content: Content) -> Content:
    """A chat without its final assistant message; a text as it is."""
    return content[:-1] if not isinstance(content, str) and content[-1]["role"] == "assistant" else content


def _rendered(tokenizer: PreTrainedTokenizerBase, content: Content, where: str) -> tuple[str, bool]:
    try:
        return render(tokenizer, content)
    except PairsError as error:
        raise PairsError(f"{where}: {error}") from error.__cause__


def _part_span(
    tokenizer: PreTrainedTokenizerBase, content: Content, part: Part, text: str, where: str
) -> tuple[int, int]:
    """Where the final answer stands in the rendered text, or what comes before it."""
    if isinstance(content, str) or content[-1]["role"] != "assistant":
        if part == "answer":
            raise PairsError(
                f"{where}: no answer in it: right is a chat that ends with a message of the assistant"
            )
        return 0, len(text)
    start, end = message_span(tokenizer, content, len(content) - 1, text, where)
    return (start, end) if part == "answer" else (0, start)


def _target_span(
    tokenizer: PreTrainedTokenizerBase, content: Content, target: str | None, text: str, where: str
) -> tuple[int, int]:
    """First character of the target in the rendered text, and the one after its last."""
    if target is not None:
        start = text.rfind(target)
        if start < 0:
            hint = "; without the whitespace at its ends it is" if target.strip() in text else ""
            raise PairsError(f"{where}: the target {_quote(target)} is not in the text {_quote(text)}{hint}")
        return start, start + len(target)
    if not isinstance(content, str):
        roles = [message["role"] for message in content]
        for role in ("assistant", "user"):
            if role in roles:
                return message_span(tokenizer, content, len(roles) - 1 - roles[::-1].index(role), text, where)
    return 0, len(text)


def message_span(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], index: int, text: str, where: str
) -> tuple[int, int]:
    """Where one message's content stands in the rendered text; templates may strip whitespace around it."""
    span = content_span(tokenizer, messages, index, text)
    if span is None:
        raise PairsError(
            f"{where}: nothing shows where the chat template puts the message "
            f"{_quote(messages[index]['content'])}; name a target"
        )
    return span


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: the named ones, and those the vocabulary marks as special (chat turns)."""
    marked = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _quote(text: str, width: int = 60) -> str:
    """A text on one line, shortened in the middle."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= width else f"{quoted[: width // 2]} … {quoted[-width // 3 :]}"
